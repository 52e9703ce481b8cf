// linear_quant on CUDA; its checks are in linear_ops.h, the kernels in linear_int8_*.cuh.
#include "../linear_ops.h"

#include "device.h"
#include "launchers.h"

namespace qk {
namespace {

void run(const char* op, const Tensor& x, const Tensor&, LinearArgs& args, QuantizeActArgs*) {
  const auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  check(on_16(args.w.codes) && on_16(args.w.scale) && on_16(args.w.zero) &&
            on_16(args.w.block_scale) && on_16(args.w.block_zero) && on_16(args.act.codes),
        op, "the weight and act_codes must lie at multiples of 16 bytes");
  launch_on(op, x, [&](cudaStream_t stream) {
    DeviceLimits limits{};
    if (cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
    const int64_t scratch = linear_int8_scratch(args, limits);
    if (scratch == 0) return launch_linear_int8(args, nullptr, nullptr, stream);
    const int64_t counter_bytes = kLinearCounters * int64_t(sizeof(uint32_t));
    const Tensor memory =
        torch::stable::new_empty(x, {scratch + counter_bytes}, ScalarType::Byte);
    auto* bytes = mutable_data<uint8_t>(memory);
    cudaError_t error = cudaMemsetAsync(bytes + scratch, 0, size_t(counter_bytes), stream);
    if (error != cudaSuccess) return error;
    return launch_linear_int8(args, bytes, reinterpret_cast<uint32_t*>(bytes + scratch), stream);
  });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("linear_quant", TORCH_BOX(&linear_quant<run>));
}

}  // namespace
}  // namespace qk
