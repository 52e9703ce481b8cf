// quantize_act, but for who computes: float activations to int8 codes, a scale per group, and the
// sums of 16 codes. Checks and allocates, then calls kRun(op, x, args) unless there are no rows.
#pragma once
#include "act.h"

namespace qk {

using QuantizeActRun = void (*)(const char* op, const Tensor& x, const QuantizeActArgs&);

// x [M, K] float32, float16 or bfloat16, rows a constant stride apart
template <QuantizeActRun kRun>
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
  if (args.m > 0) kRun(op, x, args);
  return out;
}

}  // namespace qk
