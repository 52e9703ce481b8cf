// norm, add_norm and their quantized forms: RMSNorm, and LayerNorm with center.
#include "act.h"
#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

using Optional = std::optional<Tensor>;

// x [M, K], residual [M, K] or null, weight [K], bias [K] or null
NormArgs norm_args(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, const Optional& bias,
                   double eps, bool center) {
  NormArgs a{};
  a.type = float_type(op, "x", x.scalar_type());
  a.x_stride = row_stride(op, "x", x);
  a.m = x.size(0), a.k = x.size(1);
  check(a.k > 0, op, "x needs at least one column, got ", shape_of(x));
  if (residual) {
    check(residual->scalar_type() == x.scalar_type(), op, "residual must be ", type_name(x.scalar_type()),
          " like x, got ", type_name(residual->scalar_type()));
    a.residual_stride = row_stride(op, "residual", *residual);
    check(residual->size(0) == a.m && residual->size(1) == a.k, op, "residual must be ", shape_of(x), " like x, got ",
          shape_of(*residual));
    a.residual = data(*residual);
  }
  expect(op, "weight", weight, ScalarType::Float, {a.k});
  if (bias) expect(op, "bias", *bias, ScalarType::Float, {a.k});
  check(eps >= 0, op, "eps must not be negative, got ", eps);
  a.x = data(x), a.weight = data<float>(weight), a.bias = data<float>(bias);
  a.eps = float(eps), a.center = center;
  return a;
}

void run(const NormArgs& a) {
  const bool small = a.m * a.k < 1 << 14;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.norm(a, team); });
}

Tensor new_rows(const NormArgs& a, const Tensor& like, void** to) {
  Tensor out = torch::stable::new_empty(like, {a.m, a.k}, like.scalar_type());
  *to = mutable_data(out);
  return out;
}

Tensor norm(const Tensor& x, const Tensor& weight, const Optional& bias, double eps, bool center) {
  NormArgs a = norm_args("norm", x, nullptr, weight, bias, eps, center);
  Tensor y = new_rows(a, x, &a.y);
  run(a);
  return y;
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& bias,
                                    double eps, bool center) {
  NormArgs a = norm_args("add_norm", x, &residual, weight, bias, eps, center);
  Tensor y = new_rows(a, x, &a.y), sum = new_rows(a, x, &a.sum);
  run(a);
  return {y, sum};
}

QuantActTensors norm_quant(const Tensor& x, const Tensor& weight, const Optional& bias, double eps, bool center,
                           int64_t act_group) {
  NormArgs a = norm_args("norm_quant", x, nullptr, weight, bias, eps, center);
  const int64_t kx = act_columns("norm_quant", "act_group", a.k, act_group);
  QuantActTensors act = new_act(x, a.m, kx, act_group, &a.act);
  run(a);
  return act;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_quant(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Optional& bias, double eps, bool center,
                                                          int64_t act_group) {
  NormArgs a = norm_args("add_norm_quant", x, &residual, weight, bias, eps, center);
  const int64_t kx = act_columns("add_norm_quant", "act_group", a.k, act_group);
  auto [codes, scale, sums] = new_act(x, a.m, kx, act_group, &a.act);
  Tensor sum = new_rows(a, x, &a.sum);
  run(a);
  return {codes, scale, sums, sum};
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("norm_quant", TORCH_BOX(&norm_quant));
  m.impl("add_norm_quant", TORCH_BOX(&add_norm_quant));
}

}  // namespace
}  // namespace qk
