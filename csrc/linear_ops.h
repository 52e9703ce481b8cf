// linear and linear_quant, but for who computes. Checks and allocates y, then calls
// kRun(op, x, y, args, quantize) unless there are no rows.
#pragma once
#include <string>

#include "check.h"

namespace qk {

// x is x [M, K] of linear, or act_codes [M, Kx] of linear_quant; memory is asked for beside it.
// y is [M, N], the tensor of args.y. Where linear is to quantize x first, `quantize` says how: the
// run finds memory for its `out` and sets args.act to the same, whose columns and group stand there
// already. Else it is null.
using LinearRun = void (*)(const char* op, const Tensor& x, const Tensor& y, LinearArgs& args,
                           QuantizeActArgs* quantize);

// Scales of activations and weights meet in spans of min(G, Ga) columns, whose int32 sums must not
// overflow: 32768 * 255 * 127 plus the symmetric start of 32768 * 128 * 127 stays below 2^31.
constexpr int64_t kMaxSpan = 32768;

inline void check_linear_groups(const char* op, int64_t group, int64_t act_group) {
  check_group(op, "act_group", act_group);
  check(group % act_group == 0 || act_group % group == 0, op,
        "one of group_size and act_group must divide the other, got ", group, " and ", act_group);
  const int64_t span = group < act_group ? group : act_group;
  check(span <= kMaxSpan, op, "int8 activations need a group_size or act_group of at most ",
        kMaxSpan, ", got ", span);
}

// Sets what is added to the sums; `first` names x. a->w and a->m are set.
inline void set_addends(const char* op, const char* first, const Tensor& x,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                        ScalarType y_type, LinearArgs* a) {
  if (bias) {
    expect(op, "bias", *bias, ScalarType::Float, {a->w.n});
    same_device(op, "bias", *bias, first, x);
    a->bias = data(*bias);
  }
  if (residual) {
    check(residual->scalar_type() == y_type, op, "residual must be ", type_name(y_type),
          " like the result, got ", type_name(residual->scalar_type()));
    a->residual_stride = row_stride(op, "residual", *residual);
    check(residual->size(0) == a->m && residual->size(1) == a->w.n, op, "residual must be [", a->m,
          ", ", a->w.n, "] like the result, got ", shape_of(*residual));
    same_device(op, "residual", *residual, first, x);
    a->residual = data(*residual);
  }
}

// linear(Tensor x, <weight>, Tensor? bias, str act, int act_group, Tensor? residual) -> Tensor
template <LinearRun kRun>
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale,
              const std::optional<Tensor>& zero, const std::optional<Tensor>& block_scale,
              const std::optional<Tensor>& block_zero, const std::optional<Tensor>& table,
              int64_t bits, int64_t group, int64_t n, int64_t k, const std::optional<Tensor>& bias,
              std::string act, int64_t act_group, const std::optional<Tensor>& residual) {
  constexpr const char* op = "linear";
  LinearArgs a{};
  a.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  const int64_t x_stride = row_stride(op, "x", x);
  a.x_type = a.y_type = float_type(op, "x", x.scalar_type());
  check(x.size(1) == k, op, "x must be [M, ", k, "], got ", shape_of(x));
  same_device(op, "codes", codes, "x", x);
  a.m = x.size(0), a.x_stride = x_stride, a.y_stride = n;
  set_addends(op, "x", x, bias, residual, x.scalar_type(), &a);
  const bool int8 = act == "int8";
  check(int8 || act == "float", op, "act must be \"int8\" or \"float\", got \"", act, "\"");
  if (int8) check_linear_groups(op, group, act_group);

  Tensor y = empty_on(x, {a.m, n});
  a.y = mutable_data(y);
  if (a.m == 0) return y;
  if (!int8) {
    a.x = data(x);
    kRun(op, x, y, a, nullptr);
    return y;
  }
  a.act.kx = layout::round_up(k, act_group), a.act.group = int(act_group);
  QuantizeActArgs quantize{};
  quantize.x = data(x), quantize.x_type = a.x_type, quantize.x_stride = x_stride;
  quantize.m = a.m, quantize.k = k;
  quantize.out.kx = a.act.kx, quantize.out.group = a.act.group;
  kRun(op, x, y, a, &quantize);
  return y;
}

// linear_quant(Tensor act_codes, Tensor act_scale, Tensor act_sums, <weight>, Tensor? bias,
// ScalarType dtype, Tensor? residual) -> Tensor. The group of the activations follows from the
// shapes of act_codes [M, Kx] and act_scale [M, Kx / g].
template <LinearRun kRun>
Tensor linear_quant(const Tensor& act_codes, const Tensor& act_scale, const Tensor& act_sums,
                    const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                    const std::optional<Tensor>& block_scale,
                    const std::optional<Tensor>& block_zero, const std::optional<Tensor>& table,
                    int64_t bits, int64_t group, int64_t n, int64_t k,
                    const std::optional<Tensor>& bias, ScalarType dtype,
                    const std::optional<Tensor>& residual) {
  constexpr const char* op = "linear_quant";
  LinearArgs a{};
  a.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  a.y_type = float_type(op, "dtype", dtype);
  expect(op, "act_codes", act_codes, ScalarType::Char, {-1, -1});
  const int64_t m = act_codes.size(0), kx = act_codes.size(1);
  expect(op, "act_scale", act_scale, ScalarType::Float, {m, -1});
  const int64_t act_groups = act_scale.size(1), act_group = act_groups > 0 ? kx / act_groups : 0;
  check(act_group >= 16 && act_group % 16 == 0 && kx == act_groups * act_group &&
            kx == layout::round_up(k, act_group),
        op, "act_codes must have k = ", k, " columns rounded up to whole groups of act_scale, got ",
        shape_of(act_codes), " and ", shape_of(act_scale));
  expect(op, "act_sums", act_sums, ScalarType::Short, {m, kx / 16});
  same_device(op, "act_scale", act_scale, "act_codes", act_codes);
  same_device(op, "act_sums", act_sums, "act_codes", act_codes);
  same_device(op, "codes", codes, "act_codes", act_codes);
  check_linear_groups(op, group, act_group);
  a.m = m, a.y_stride = n;
  set_addends(op, "act_codes", act_codes, bias, residual, dtype, &a);
  a.act = {data<int8_t>(act_codes), data<float>(act_scale), data<int16_t>(act_sums), kx,
           int(act_group)};

  Tensor y = empty_on(act_codes, {m, n}, dtype);
  a.y = mutable_data(y);
  if (m > 0) kRun(op, act_codes, y, a, nullptr);
  return y;
}

}  // namespace qk
