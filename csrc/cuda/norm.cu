// norm and add_norm on CUDA: checks, allocation and launch. The kernels are in norm.cuh.
#include "norm.cuh"

#include <limits>
#include <tuple>

#include "device.h"

namespace qk {
namespace {

// x [M, K]; weight, bias [K] float32
NormArgs make_norm(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                   bool center) {
  NormArgs args{};
  args.type = float_type(op, "x", x.scalar_type());
  args.x_stride = row_stride(op, "x", x);
  args.m = x.size(0), args.k = x.size(1);
  check(args.k > 0, op, "x needs at least one column, got ", shape_of(x));
  check(args.m <= std::numeric_limits<int32_t>::max(), op, "x has more rows than a grid has blocks: ", args.m);
  check(eps >= 0, op, "eps must not be negative, got ", eps);
  expect(op, "weight", weight, ScalarType::Float, {args.k});
  same_device(op, "x", x, x);
  same_device(op, "weight", weight, x);
  if (bias) {
    expect(op, "bias", *bias, ScalarType::Float, {args.k});
    same_device(op, "bias", *bias, x);
  }
  args.x = data(x);
  args.weight = data<float>(weight);
  args.bias = data<float>(bias);
  args.eps = float(eps);
  args.center = center;
  return args;
}

// [M, K] in x's dtype
Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps, bool center) {
  constexpr const char* op = "norm";
  NormArgs args = make_norm(op, x, weight, bias, eps, center);
  const Launch launch(op, x);
  Tensor y = torch::stable::new_empty(x, {args.m, args.k});
  args.y = mutable_data(y);
  launch.done(launch_norm(args, launch.stream()));
  return y;
}

// residual [M, K] of x's dtype -> y, x + residual
std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, bool center) {
  constexpr const char* op = "add_norm";
  NormArgs args = make_norm(op, x, weight, bias, eps, center);
  check(residual.scalar_type() == x.scalar_type(), op, "residual must be ", type_name(x.scalar_type()), " like x, got ",
        type_name(residual.scalar_type()));
  check(residual.dim() == 2 && residual.size(0) == args.m && residual.size(1) == args.k, op, "residual must be ",
        shape_of(x), " like x, got ", shape_of(residual));
  same_device(op, "residual", residual, x);
  args.residual_stride = row_stride(op, "residual", residual);
  args.residual = data(residual);
  const Launch launch(op, x);
  Tensor y = torch::stable::new_empty(x, {args.m, args.k}), sum = torch::stable::new_empty(x, {args.m, args.k});
  args.y = mutable_data(y);
  args.sum = mutable_data(sum);
  launch.done(launch_norm(args, launch.stream()));
  return {y, sum};
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CUDA, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("add_norm", TORCH_BOX(&add_norm));
}

}  // namespace
}  // namespace qk
