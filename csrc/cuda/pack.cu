// pack, unpack and dequantize on CUDA; their checks are in pack_ops.h, the kernels in pack.cuh.
#include "pack.cuh"

#include "../pack_ops.h"
#include "device.h"
#include "launchers.h"

namespace qk {
namespace {

// Waits for the kernel: the codes have to be looked at before anyone uses what is packed.
uint32_t run_pack(const char* op, const Tensor& codes, PackArgs& args) {
  const Tensor word = empty_on(codes, {1}, ScalarType::Int);
  args.seen = inplace_data<uint32_t>(word);
  uint32_t seen = 0;
  launch_on(op, codes, [&](cudaStream_t stream) {
    cudaError_t error = cudaMemsetAsync(args.seen, 0, sizeof seen, stream);
    if (error == cudaSuccess) error = launch_pack(args, stream);
    if (error == cudaSuccess)
      error = cudaMemcpyAsync(&seen, args.seen, sizeof seen, cudaMemcpyDeviceToHost, stream);
    return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
  });
  return seen;
}

void run_unpack(const char* op, const Tensor& codes, const UnpackArgs& args) {
  check_on_16_bytes(op, "codes", args.w.codes);
  launch_on(op, codes, [&](cudaStream_t stream) { return launch_unpack(args, stream); });
}

void run_dequantize(const char* op, const Tensor& codes, const UnpackArgs& args) {
  check_on_16_bytes(op, "codes", args.w.codes);
  launch_on(op, codes, [&](cudaStream_t stream) { return launch_dequantize(args, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("pack", TORCH_BOX(&pack<run_pack>));
  m.impl("unpack", TORCH_BOX(&unpack<run_unpack>));
  m.impl("dequantize", TORCH_BOX(&dequantize<run_dequantize>));
}

}  // namespace

cudaError_t launch_dequantize(const UnpackArgs& args, cudaStream_t stream) {
  switch (args.out_type) {
    case Dtype::f32: return launch_dequantize_typed<float>(args, stream);
    case Dtype::f16: return launch_dequantize_typed<half_t>(args, stream);
    case Dtype::bf16: return launch_dequantize_typed<bf16_t>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
