// sample on CUDA; its checks are in sample_ops.h, the kernel in sample.cuh.
#include "sample.cuh"

#include <limits>

#include "../sample_ops.h"
#include "device.h"

namespace qk {
namespace {

void run(const char* op, const Tensor& logits, const SampleArgs& args) {
  check(args.batch <= std::numeric_limits<int32_t>::max(), op,
        "logits have more rows than a grid has blocks: ", args.batch);
  launch_on(op, logits, [&](cudaStream_t stream) { return launch_sample(args, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("sample", TORCH_BOX((&sample<run, Contents::unchecked>)));
}

}  // namespace
}  // namespace qk
