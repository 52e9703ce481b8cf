// quantize_act on the CPU; its checks are in quantize_act_ops.h.
#include "../quantize_act_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

void run(const char*, const Tensor&, const QuantizeActArgs& args) {
  const bool small = args.m * args.out.kx < 1 << 14;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.quantize_act(args, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) { m.impl("quantize_act", TORCH_BOX(&quantize_act<run>)); }

}  // namespace
}  // namespace qk
