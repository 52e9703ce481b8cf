// RMSNorm and LayerNorm, with an optional residual added first and an optional int8 output. One
// thread per row: the statistics of a row are never split, so they do not depend on the team.
#include "quantize.h"

namespace qk::QK_ISA {
namespace {

constexpr int kSums = 4;  // independent accumulators, so that additions do not wait for each other

// Rounds to the storage type: what a later load of a stored value gives.
template <class T>
QK_INLINE VF rounded(VF v) {
  typename T::type lanes[W];
  T::store(lanes, v);
  return T::load(lanes);
}

// Sum of f(column, whole) over [0, k) in steps of W. f is told at compile time whether all W
// columns are there; if not, its lanes from column k on must be zero.
template <class F>
QK_INLINE float sum_row(int64_t k, F f) {
  VF sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * W <= k; i += kSums * W)
    for (int j = 0; j < kSums; j++) sum[j] = sum[j] + f(i + j * W, std::true_type());
  for (; i + W <= k; i += W) sum[0] = sum[0] + f(i, std::true_type());
  if (i < k) sum[0] = sum[0] + f(i, std::false_type());
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// f(column, whole) for all columns of [0, k) in steps of W.
template <class F>
QK_INLINE void each_column(int64_t k, F f) {
  int64_t i = 0;
  for (; i + W <= k; i += W) f(i, std::true_type());
  if (i < k) f(i, std::false_type());
}

// y may be x, and sum may be the residual: a column is read before it is written, and no later one
// depends on it. A residual comes with a sum.
template <class T, bool Center>
QK_INLINE void norm_row(const NormArgs& a, int64_t row) {
  using type = typename T::type;
  const auto* x = static_cast<const type*>(a.x) + row * a.x_stride;
  const auto* residual =
      a.residual ? static_cast<const type*>(a.residual) + row * a.residual_stride : nullptr;
  auto* sum = residual ? static_cast<type*>(a.sum) + row * a.k : nullptr;
  const int64_t k = a.k;

  // What is summed up first: the columns themselves to be centred, else their squares.
  const auto term = [](VF v) __attribute__((always_inline)) { return Center ? v : v * v; };
  float first;
  if (sum) {
    // What is normalized is the stored sum, rounded to its type.
    first = sum_row(k, [&](int64_t i, auto whole) __attribute__((always_inline)) {
      constexpr bool all = decltype(whole)::value;
      const VF v = rounded<T>(load_columns<T, all>(x, i, k) + load_columns<T, all>(residual, i, k));
      store_columns<T, all>(sum, i, k, v);
      return term(v);
    });
    x = sum;
  } else {
    first = sum_row(k, [&](int64_t i, auto whole) __attribute__((always_inline)) {
      return term(load_columns<T, decltype(whole)::value>(x, i, k));
    });
  }
  const float count = float(k), mean = Center ? first / count : 0.f;
  const VF shift = splat(mean);
  float square = first;
  if (Center)
    square = sum_row(k, [&](int64_t i, auto whole) __attribute__((always_inline)) {
      VF d = load_columns<T, decltype(whole)::value>(x, i, k) - shift;
      if (!decltype(whole)::value)
        for (int j = int(k - i); j < W; j++) d[j] = 0.f;
      return d * d;
    });
  const VF scale = splat(1.f / __builtin_sqrtf(square / count + a.eps));
  using F = Io<Dtype::f32>;
  const auto output = [&](int64_t i, auto whole) __attribute__((always_inline)) {
    constexpr bool all = decltype(whole)::value;
    VF v = load_columns<T, all>(x, i, k);
    if (Center) v = v - shift;
    v = v * scale * load_columns<F, all>(a.weight, i, k);
    if (a.bias) v = v + load_columns<F, all>(a.bias, i, k);
    return v;
  };
  if (!a.act.codes) {
    auto* y = static_cast<type*>(a.y) + row * k;
    each_column(k, [&](int64_t i, auto whole) __attribute__((always_inline)) {
      store_columns<T, decltype(whole)::value>(y, i, k, output(i, whole));
    });
    return;
  }
  const int64_t groups = a.act.kx / a.act.group;
  const RowOut out = row_out(a.act, row, groups);
  for (int64_t g = 0; g < groups; g++) quantize_group<true>(out, g, a.act.group, k, output);
}

}  // namespace

void norm(const NormArgs& a, Team& team) {
  const Range share = team.share(a.m);
  with_type(a.type, [&](auto io) __attribute__((always_inline)) {
    using T = decltype(io);
    for (int64_t row = share.begin; row < share.end; row++) {
      if (a.center) norm_row<T, true>(a, row);
      else norm_row<T, false>(a, row);
    }
  });
}

}  // namespace qk::QK_ISA
