// sample on the CPU; its checks are in sample_ops.h.
#include "../sample_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

void run(const char*, const Tensor&, const SampleArgs& a) {
  const bool small = a.batch * a.vocab < 1 << 13 || a.batch < 2;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.sample(a, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("sample", TORCH_BOX((&sample<run, Contents::checked>)));
}

}  // namespace
}  // namespace qk
