// kv_append on the CPU; its checks are in kv_append_ops.h.
#include "../kv_append_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {

void run_kv_append(const char*, const Tensor&, const KvAppendArgs& args) {
  const Kernels& kernel = kernels();
  // One core has rotated and stored so many numbers before a second one has started.
  const int64_t numbers =
      args.batch.tokens * (args.q_heads + 2 * args.pages.kv_heads) * args.pages.dim;
  const bool small = numbers < 1 << 13;
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.kv_append(args, team); });
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("kv_append", TORCH_BOX((&kv_append<run_kv_append, Contents::checked>)));
}

}  // namespace
}  // namespace qk
