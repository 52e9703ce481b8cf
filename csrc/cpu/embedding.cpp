// embedding on the CPU; its checks are in embedding_ops.h.
#include "../embedding_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

void run(const char*, const Tensor&, const EmbeddingArgs& args) {
  const bool small = args.t * args.w.k < 1 << 14;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.embedding(args, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("embedding", TORCH_BOX((&embedding<run, Contents::checked>)));
}

}  // namespace
}  // namespace qk
