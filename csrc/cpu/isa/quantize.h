// int8 quantization of one group of activations: the one definition behind quantize_act, norm_quant
// and gate_quant, so that a fused op gives bitwise what quantize_act makes of the float32 result.
//
//   amax = max |x|,  scale = amax / 127,  code = round half to even (x * (127 / amax)),  in float32
//
// Two kinds of groups get codes of 0. amax < kTiny, where 127 / amax could overflow: scale 0. A
// value that is infinite or NaN: scale NaN, so that it reaches the result as NaN * 0.
#pragma once
#include <type_traits>

#include "simd.h"

namespace qk::QK_ISA {
namespace {

constexpr float kTiny = 7.888609052210118e-31f;  // 2^-100

// Values that are costly to compute are kept on the stack while a group is not longer than this.
constexpr int kGroupBuffer = 2048;

struct RowOut {
  int8_t* codes;  // of one row
  float* scale;
  int16_t* sums;
};
// groups: of a row, out.kx / out.group.
QK_INLINE RowOut row_out(const QuantActOut& out, int64_t row, int64_t groups) {
  return {out.codes + row * out.kx, out.scale + row * groups, out.sums + row * (out.kx / 16)};
}

// f(row, item) for the items of `share` in rows of `count` items each.
template <class F>
QK_INLINE void each_item(Range share, int64_t count, F f) {
  if (share.begin >= share.end) return;
  int64_t row = share.begin / count, item = share.begin % count;
  for (int64_t i = share.begin; i < share.end; i++) {
    f(row, item);
    if (++item == count) item = 0, row++;
  }
}

// The first n < W values of p, then zeros.
template <class T>
QK_INLINE VF load_part(const typename T::type* p, int64_t n) {
  typename T::type lanes[W] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
  return T::load(lanes);
}
// The W values from p + i, zeros from column k on. Whole: there are W of them.
template <class T, bool Whole>
QK_INLINE VF load_columns(const typename T::type* p, int64_t i, int64_t k) {
  if constexpr (Whole) return T::load(p + i);
  else return load_part<T>(p + i, k - i);
}
// Stores those of the W lanes whose column is below k.
template <class T, bool Whole>
QK_INLINE void store_columns(typename T::type* p, int64_t i, int64_t k, VF v) {
  if constexpr (Whole) T::store(p + i, v);
  else
    for (int64_t j = 0; i + j < k; j++) T::put(p + i + j, v[j]);
}

// Bits of |v|: as integers they order like the values, with infinity above the finite and NaN above
// infinity, so an integer maximum keeps a NaN that a float maximum could lose.
QK_INLINE VI magnitude(VF v) { return (VI)v & splat_i(0x7fffffff); }
QK_INLINE VI max_i(VI a, VI b) { return a > b ? a : b; }
QK_INLINE float max_magnitude(VI v) {
  const I4 top = fold<I4>(v, [](auto a, auto b) { return a > b ? a : b; });
  float out;
  std::memcpy(&out, &top, 4);
  return out;
}

// 16 values to codes, and their sum.
QK_INLINE int16_t quantize16(const VF* v, float inverse, int8_t* codes) {
  const VF factor = splat(inverse);
#if defined(QK_ISA_AVX2) || defined(QK_ISA_AVX512)
  __m256i lo, hi;
#if defined(QK_ISA_AVX512)
  const VI all = round_int(v[0] * factor);
  std::memcpy(&lo, &all, 32);
  std::memcpy(&hi, (const char*)&all + 32, 32);
#else
  lo = (__m256i)round_int(v[0] * factor), hi = (__m256i)round_int(v[1] * factor);
#endif
  const __m128i a = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i b = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128((__m128i*)codes, _mm_packs_epi16(a, b));
  __m128i sum = _mm_madd_epi16(_mm_add_epi16(a, b), _mm_set1_epi16(1));  // four int32
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
  return int16_t(_mm_cvtsi128_si32(sum));
#else
  VI sum = {};
  for (int i = 0; i < 16 / W; i++) {
    const VI q = round_int(v[i] * factor);
    store_raw(codes + W * i, __builtin_convertvector(q, VB));
    sum += q;
  }
  int total = 0;
  for (int i = 0; i < W; i++) total += sum[i];
  return int16_t(total);
#endif
}

// Quantizes columns [g * group, (g + 1) * group) of a row. `value(i)` gives the W values from
// column i on, zero from the row's logical end on; it is called at multiples of W, and once per
// column if the group is not longer than kGroupBuffer and keep is set, else twice (it must give the
// same again). Usual: the group, if it is known at compile time, else 0.
template <bool keep, int Usual, class F>
QK_INLINE void quantize_values(const RowOut& out, int64_t g, int any_group, F value) {
  constexpr int N = 16 / W;  // vectors of 16 columns, of which a group is a multiple
  const int group = Usual ? Usual : any_group;
  const int64_t begin = g * group;
  int8_t* codes = out.codes + begin;
  int16_t* sums = out.sums + begin / 16;
  alignas(64) float kept[keep ? Usual ? Usual : kGroupBuffer : 1];
  const bool buffered = keep && group <= kGroupBuffer;
  VI top[N] = {};
  for (int i = 0; i < group; i += 16)
    for (int j = 0; j < N; j++) {
      const VF v = value(begin + i + W * j);
      if (buffered) store(kept + i + W * j, v);
      top[j] = max_i(top[j], magnitude(v));
    }
  for (int j = 1; j < N; j++) top[0] = max_i(top[0], top[j]);
  const float amax = max_magnitude(top[0]);
  const bool used = amax >= kTiny && amax <= 3.402823466e38f;
  if (!used) {
    out.scale[g] = amax < kTiny ? 0.f : __builtin_nanf("");
    std::memset(codes, 0, size_t(group));
    std::memset(sums, 0, size_t(group) / 16 * sizeof(int16_t));
    return;
  }
  const float inverse = 127.f / amax;
  out.scale[g] = amax / 127.f;
  for (int i = 0; i < group; i += 16) {
    VF v[N];
    for (int j = 0; j < N; j++) v[j] = buffered ? load(kept + i + W * j) : value(begin + i + W * j);
    sums[i / 16] = quantize16(v, inverse, codes + i);
  }
}

// Quantizes group g of a row of k columns. `value(i, whole)` gives the W values from column i on,
// and is told at compile time whether all of them are below k; it is not asked from k on.
template <bool keep, class F>
QK_INLINE void quantize_group(const RowOut& out, int64_t g, int group, int64_t k, F value) {
  const auto whole = [&](int64_t i)
                         __attribute__((always_inline)) { return value(i, std::true_type()); };
  if ((g + 1) * group <= k) {
    if (group == 32) quantize_values<keep, 32>(out, g, group, whole);
    else quantize_values<keep, 0>(out, g, group, whole);
    return;
  }
  quantize_values<keep, 0>(out, g, group, [&](int64_t i) __attribute__((always_inline)) {
    return i + W <= k ? whole(i) : i < k ? value(i, std::false_type()) : VF{};
  });
}

}  // namespace
}  // namespace qk::QK_ISA
