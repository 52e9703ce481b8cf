// norm, add_norm and their quantized forms, but for who computes: RMSNorm, and LayerNorm with
// center. Checks and allocates, then calls kRun(op, x, args) unless there are no rows.
#pragma once
#include "act.h"

namespace qk {

using NormRun = void (*)(const char* op, const Tensor& x, const NormArgs&);

// x [M, K], residual [M, K] or null, weight [K], bias [K] or null
inline NormArgs norm_args(const char* op, const Tensor& x, const Tensor* residual,
                          const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                          bool center) {
  NormArgs a{};
  a.type = float_type(op, "x", x.scalar_type());
  a.x_stride = row_stride(op, "x", x);
  a.m = x.size(0), a.k = x.size(1);
  check(a.k > 0, op, "x needs at least one column, got ", shape_of(x));
  if (residual) {
    check(residual->scalar_type() == x.scalar_type(), op, "residual must be ",
          type_name(x.scalar_type()), " like x, got ", type_name(residual->scalar_type()));
    a.residual_stride = row_stride(op, "residual", *residual);
    check(residual->size(0) == a.m && residual->size(1) == a.k, op, "residual must be ",
          shape_of(x), " like x, got ", shape_of(*residual));
    same_device(op, "residual", *residual, "x", x);
    a.residual = data(*residual);
  }
  expect(op, "weight", weight, ScalarType::Float, {a.k});
  same_device(op, "weight", weight, "x", x);
  if (bias) {
    expect(op, "bias", *bias, ScalarType::Float, {a.k});
    same_device(op, "bias", *bias, "x", x);
  }
  check(eps >= 0, op, "eps must not be negative, got ", eps);
  a.x = data(x), a.weight = data<float>(weight), a.bias = data<float>(bias);
  a.eps = float(eps), a.center = center;
  return a;
}

inline Tensor new_rows(const NormArgs& a, const Tensor& like, void** to) {
  Tensor out = empty_on(like, {a.m, a.k}, like.scalar_type());
  *to = mutable_data(out);
  return out;
}

template <NormRun kRun>
Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            bool center) {
  NormArgs a = norm_args("norm", x, nullptr, weight, bias, eps, center);
  Tensor y = new_rows(a, x, &a.y);
  if (a.m > 0) kRun("norm", x, a);
  return y;
}

template <NormRun kRun>
std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, bool center) {
  NormArgs a = norm_args("add_norm", x, &residual, weight, bias, eps, center);
  Tensor y = new_rows(a, x, &a.y), sum = new_rows(a, x, &a.sum);
  if (a.m > 0) kRun("add_norm", x, a);
  return {y, sum};
}

template <NormRun kRun>
QuantActTensors norm_quant(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           double eps, bool center, int64_t act_group) {
  NormArgs a = norm_args("norm_quant", x, nullptr, weight, bias, eps, center);
  const int64_t kx = act_columns("norm_quant", "act_group", a.k, act_group);
  QuantActTensors act = new_act(x, a.m, kx, act_group, &a.act);
  if (a.m > 0) kRun("norm_quant", x, a);
  return act;
}

template <NormRun kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_quant(const Tensor& x, const Tensor& residual,
                                                          const Tensor& weight,
                                                          const std::optional<Tensor>& bias,
                                                          double eps, bool center,
                                                          int64_t act_group) {
  NormArgs a = norm_args("add_norm_quant", x, &residual, weight, bias, eps, center);
  const int64_t kx = act_columns("add_norm_quant", "act_group", a.k, act_group);
  auto [codes, scale, sums] = new_act(x, a.m, kx, act_group, &a.act);
  Tensor sum = new_rows(a, x, &a.sum);
  if (a.m > 0) kRun("add_norm_quant", x, a);
  return {codes, scale, sums, sum};
}

}  // namespace qk
