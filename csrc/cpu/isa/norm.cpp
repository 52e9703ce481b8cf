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

// Sum of f(column) over [0, k) in steps of W; f's lanes from column k on must be zero.
template <class F>
QK_INLINE float sum_row(int64_t k, F f) {
  VF sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * W <= k; i += kSums * W)
    for (int j = 0; j < kSums; j++) sum[j] = sum[j] + f(i + j * W);
  for (; i < k; i += W) sum[0] = sum[0] + f(i);
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// y may be x, and sum may be the residual: a column is read before it is written, and no later one
// depends on it.
template <class T>
QK_INLINE void norm_row(const NormArgs& a, int64_t row) {
  using type = typename T::type;
  const auto* x = static_cast<const type*>(a.x) + row * a.x_stride;
  const auto* residual =
      a.residual ? static_cast<const type*>(a.residual) + row * a.residual_stride : nullptr;
  auto* sum = a.sum ? static_cast<type*>(a.sum) + row * a.k : nullptr;
  const int64_t k = a.k;

  // What is normalized is the stored sum, rounded to its type.
  const auto input = [&](int64_t i) __attribute__((always_inline)) {
    const VF v = load_upto<T>(x, i, k);
    return residual ? rounded<T>(v + load_upto<T>(residual, i, k)) : v;
  };
  if (sum) {
    for (int64_t i = 0; i < k; i += W) store_upto<T>(sum, i, k, input(i));
    x = sum, residual = nullptr;
  }

  const float count = float(k);
  float mean = 0.f, square;
  if (a.center) {
    mean = sum_row(k, input) / count;
    const VF m = splat(mean);
    square = sum_row(k, [&](int64_t i) __attribute__((always_inline)) {
      VF d = input(i) - m;
      if (i + W > k)
        for (int j = int(k - i); j < W; j++) d[j] = 0.f;
      return d * d;
    });
  } else {
    square = sum_row(k, [&](int64_t i) __attribute__((always_inline)) {
      const VF v = input(i);
      return v * v;
    });
  }
  const VF scale = splat(1.f / __builtin_sqrtf(square / count + a.eps)), shift = splat(mean);
  using F = Io<Dtype::f32>;
  const auto output = [&](int64_t i) __attribute__((always_inline)) {
    VF v = input(i);
    if (a.center) v = v - shift;
    v = v * scale * load_upto<F>(a.weight, i, k);
    if (a.bias) v = v + load_upto<F>(a.bias, i, k);
    return v;
  };
  if (!a.act.codes) {
    auto* y = static_cast<type*>(a.y) + row * k;
    for (int64_t i = 0; i < k; i += W) store_upto<T>(y, i, k, output(i));
    return;
  }
  const auto padded = [&](int64_t i)
                          __attribute__((always_inline)) { return i < k ? output(i) : VF{}; };
  const RowOut out = row_out(a.act, row);
  for (int64_t g = 0; g < a.act.kx / a.act.group; g++)
    quantize_group<true>(out, g, a.act.group, padded);
}

}  // namespace

void norm(const NormArgs& a, Team& team) {
  const Range share = team.share(a.m);
  with_type(a.type, [&](auto io) __attribute__((always_inline)) {
    for (int64_t row = share.begin; row < share.end; row++) norm_row<decltype(io)>(a, row);
  });
}

}  // namespace qk::QK_ISA
