// The norm ops on CUDA; their checks are in norm_ops.h, the kernels in norm.cuh.
#include "norm.cuh"

#include <limits>

#include "../norm_ops.h"
#include "device.h"

namespace qk {
namespace {

void run(const char* op, const Tensor& x, const NormArgs& args) {
  check(args.m <= std::numeric_limits<int32_t>::max(), op,
        "x has more rows than a grid has blocks: ", args.m);
  launch_on(op, x, [&](cudaStream_t stream) { return launch_norm(args, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("norm", TORCH_BOX(&norm<run>));
  m.impl("add_norm", TORCH_BOX(&add_norm<run>));
  m.impl("norm_quant", TORCH_BOX(&norm_quant<run>));
  m.impl("add_norm_quant", TORCH_BOX(&add_norm_quant<run>));
}

}  // namespace
}  // namespace qk
