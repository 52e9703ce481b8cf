// kv_append on the CPU; its checks are in kv_append_ops.h.
#include "../kv_append_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

void run(const char*, const Tensor&, const KvAppendArgs& args) {
  const Kernels& kernel = kernels();
  run_team(team_size(), [&](Team& team) { kernel.kv_append(args, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("kv_append", TORCH_BOX((&kv_append<run, Contents::checked>)));
}

}  // namespace
}  // namespace qk
