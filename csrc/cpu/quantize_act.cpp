// quantize_act: float activations to int8 codes, a scale per group, and the sums of 16 codes.
#include "../act.h"
#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

// x [M, K] float32, float16 or bfloat16, rows a constant stride apart
QuantActTensors quantize_act(const Tensor& x, int64_t group) {
  constexpr const char* op = "quantize_act";
  QuantizeActArgs args{};
  args.x_type = float_type(op, "x", x.scalar_type());
  args.x_stride = row_stride(op, "x", x);
  args.m = x.size(0), args.k = x.size(1);
  check(args.k > 0, op, "x needs at least one column, got ", shape_of(x));
  const int64_t kx = act_columns(op, "group", args.k, group);
  QuantActTensors out = new_act(x, args.m, kx, group, &args.out);
  args.x = data(x);
  const bool small = args.m * kx < 1 << 14;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.quantize_act(args, team); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) { m.impl("quantize_act", TORCH_BOX(&quantize_act)); }

}  // namespace
}  // namespace qk
