// quantize_act on CUDA; its checks are in quantize_act_ops.h, the kernels in quantize_act.cuh.
#include "quantize_act.cuh"

#include "../quantize_act_ops.h"
#include "device.h"
#include "launchers.h"

namespace qk {
namespace {

template <class T>
cudaError_t launch_typed(const QuantizeActArgs& args, cudaStream_t stream) {
  using Source = ActivationSource<T>;
  const Source source{static_cast<const T*>(args.x), args.k, args.x_stride};
  const bool aligned = on_16_bytes(args.x) && args.k % Source::kPer == 0 &&
                       args.x_stride % Source::kPer == 0 && on_16_bytes(args.out.codes);
  return launch_quantize(source, args.out, args.m, aligned, stream);
}

void run(const char* op, const Tensor& x, const QuantizeActArgs& args) {
  launch_on(op, x, [&](cudaStream_t stream) { return launch_quantize_act(args, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("quantize_act", TORCH_BOX(&quantize_act<run>));
}

}  // namespace

cudaError_t launch_quantize_act(const QuantizeActArgs& args, cudaStream_t stream) {
  if (args.m == 0) return cudaSuccess;
  switch (args.x_type) {
    case Dtype::f32: return launch_typed<float>(args, stream);
    case Dtype::f16: return launch_typed<half_t>(args, stream);
    case Dtype::bf16: return launch_typed<bf16_t>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
