// embedding on CUDA; its checks are in embedding_ops.h, the kernel in embedding.cuh.
#include "embedding.cuh"

#include "../embedding_ops.h"
#include "device.h"

namespace qk {
namespace {

void run(const char* op, const Tensor& codes, const EmbeddingArgs& args) {
  check_on_16_bytes(op, "codes", args.w.codes);
  launch_on(op, codes, [&](cudaStream_t stream) { return launch_embedding(args, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("embedding", TORCH_BOX((&embedding<run, Contents::unchecked>)));
}

}  // namespace
}  // namespace qk
