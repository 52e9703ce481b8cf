// gate and gate_quant on the CPU; their checks are in gate_ops.h.
#include "../gate_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

void run(const char*, const Tensor&, const GateArgs& a) {
  const bool small = a.m * a.k < 1 << 13;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.gate(a, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("gate", TORCH_BOX(&gate<run>));
  m.impl("gate_quant", TORCH_BOX(&gate_quant<run>));
}

}  // namespace
}  // namespace qk
