// activation(gate) * up, as floats or as int8 activations. Elements are independent: the team
// shares chunks of columns.
#include "quantize.h"

namespace qk::QK_ISA {
namespace {

constexpr int64_t kGateColumns = 512;

QK_INLINE VF sigmoid_times(VF x, VF minus_u) { return x / (splat(1.f) + vexp(minus_u)); }

// x * Phi(x). With z = |x| / sqrt 2, Phi(-|x|) = erfcx(z) * exp(-z^2) / 2, which keeps its relative
// precision in the tail where 1 + erf would cancel. erfcx(z) = exp(z^2) erfc(z) is a polynomial in
// t = (z - 3) / (z + 3), interpolated on Chebyshev points for 0 <= z <= 10 (relative error 4e-9
// before rounding); beyond, exp(-z^2) is 0 in float32.
QK_INLINE VF gelu_erf(VF x) {
  const VF z = vmin(vabs(x) * splat(0.70710678f), splat(10.f));
  const VF t = (z - splat(3.f)) / (z + splat(3.f));
  VF p = splat(5.3706684e-05f);
  p = fma(p, t, splat(2.4406856e-05f));
  p = fma(p, t, splat(-0.000595398f));
  p = fma(p, t, splat(0.00071869587f));
  p = fma(p, t, splat(0.0042700227f));
  p = fma(p, t, splat(-0.024394935f));
  p = fma(p, t, splat(0.07166559f));
  p = fma(p, t, splat(-0.15011571f));
  p = fma(p, t, splat(0.24560381f));
  p = fma(p, t, splat(-0.32623357f));
  p = fma(p, t, splat(0.17900115f));
  // x^2 = square + rest exactly, where the set has a fused multiply-add; exp(-rest / 2) is 1 - rest
  // / 2.
  const VF square = x * x, rest = fma(x, x, -square);
  const VF tail = splat(0.5f) * p * vexp(splat(-0.5f) * square) * (splat(1.f) - splat(0.5f) * rest);
  const VF bounded =
      vabs(x) < splat(14.f) ? tail : splat(0.f);  // there square may be infinite, and rest NaN
  const VF phi = x < splat(0.f) ? bounded : splat(1.f) - bounded;
  return x * phi;
}

template <Activation A>
QK_INLINE VF activate(VF x) {
  if constexpr (A == Activation::silu) return sigmoid_times(x, -x);
  if constexpr (A == Activation::gelu_erf) return gelu_erf(x);
  if constexpr (A == Activation::relu) return x < splat(0.f) ? splat(0.f) : x;  // NaN stays
  // 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
  return sigmoid_times(x, -x * fma(x * x, splat(0.071354816f), splat(1.5957691f)));
}

template <class T, Activation A>
QK_INLINE void gate_rows(const GateArgs& a, Team& team) {
  using type = typename T::type;
  const auto value = [&](int64_t row, int64_t i, auto whole) __attribute__((always_inline)) {
    constexpr bool all = decltype(whole)::value;
    const auto* gate = static_cast<const type*>(a.gate) + row * a.gate_stride;
    const VF y = activate<A>(load_columns<T, all>(gate, i, a.k));
    if (!a.up) return y;
    return y * load_columns<T, all>(static_cast<const type*>(a.up) + row * a.up_stride, i, a.k);
  };
  if (!a.act.codes) {
    const int64_t chunks = (a.k + kGateColumns - 1) / kGateColumns;
    const Range share = team.share(a.m * chunks);
    for (int64_t item = share.begin; item < share.end; item++) {
      const int64_t row = item / chunks, begin = item % chunks * kGateColumns;
      const int64_t end = begin + kGateColumns < a.k ? begin + kGateColumns : a.k;
      auto* y = static_cast<type*>(a.y) + row * a.k;
      int64_t i = begin;
      for (; i + W <= end; i += W) T::store(y + i, value(row, i, std::true_type()));
      if (i < end) store_columns<T, false>(y, i, end, value(row, i, std::false_type()));
    }
    return;
  }
  const int64_t groups = a.act.kx / a.act.group;
  each_item(
      team.share(a.m * groups), groups, [&](int64_t row, int64_t g) __attribute__((always_inline)) {
        quantize_group<true>(row_out(a.act, row, groups), g, a.act.group, a.k,
                             [&](int64_t i, auto whole)
                                 __attribute__((always_inline)) { return value(row, i, whole); });
      });
}

template <Activation A>
__attribute__((noinline)) void gate_with(const GateArgs& a, Team& team) {
  with_type(a.type,
            [&](auto io) __attribute__((always_inline)) { gate_rows<decltype(io), A>(a, team); });
}

}  // namespace

void gate(const GateArgs& a, Team& team) {
  switch (a.activation) {
    case Activation::silu: return gate_with<Activation::silu>(a, team);
    case Activation::gelu_tanh: return gate_with<Activation::gelu_tanh>(a, team);
    case Activation::gelu_erf: return gate_with<Activation::gelu_erf>(a, team);
    case Activation::relu: return gate_with<Activation::relu>(a, team);
  }
}

}  // namespace qk::QK_ISA
