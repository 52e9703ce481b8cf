// The norm ops on the CPU; their checks are in norm_ops.h.
#include "../norm_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

void run(const char*, const Tensor&, const NormArgs& a) {
  const bool small = a.m * a.k < 1 << 14;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.norm(a, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm<run>));
  m.impl("add_norm", TORCH_BOX(&add_norm<run>));
  m.impl("norm_quant", TORCH_BOX(&norm_quant<run>));
  m.impl("add_norm_quant", TORCH_BOX(&add_norm_quant<run>));
}

}  // namespace
}  // namespace qk
