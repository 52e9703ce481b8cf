// Float and int32 vectors of the instruction set at hand, on GCC's vector extensions: one source
// for every set, and no x86 header in the scalar path. W lanes: 16 (AVX-512), 8 (AVX2), 4 (the
// baseline of any machine). With QK_EMULATE_AVX512 the 16-lane version is lowered to AVX2, so that
// its code runs where AVX-512 is missing.
#pragma once
#include <cstring>

#include "isa.h"

#if defined(QK_ISA_AVX2) || defined(QK_ISA_AVX512)
#include <immintrin.h>
#endif
#if defined(QK_ISA_AVX512) && !defined(QK_EMULATE_AVX512)
#define QK_NATIVE_AVX512 1
#endif

// Emulated code is for tests: unrolled it takes minutes to compile.
#if defined(QK_ISA_AVX512) && !defined(QK_NATIVE_AVX512)
#define QK_UNROLL(n) _Pragma("GCC unroll 1")
#define QK_HOT __attribute__((noinline))
#else
#define QK_UNROLL_(text) _Pragma(#text)
#define QK_UNROLL(n) QK_UNROLL_(GCC unroll n)
#define QK_HOT QK_INLINE
#endif

namespace qk::QK_ISA {
namespace {

#if defined(QK_ISA_AVX512)
constexpr int W = 16;
#elif defined(QK_ISA_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float VF __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef int8_t VB __attribute__((vector_size(W)));

// v - 0 is v, even for -0, so that this is a broadcast alone; 0 + v is an addition.
QK_INLINE VF splat(float v) { return v - VF{}; }
QK_INLINE VI splat_i(int32_t v) { return VI{} + v; }

template <class V, class P>
QK_INLINE V load_raw(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
QK_INLINE void store_raw(P* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
// Four bytes in every lane.
QK_INLINE VI splat_four(const int8_t* x) { return splat_i(load_raw<int32_t>(x)); }
QK_INLINE VF load(const float* p) { return load_raw<VF>(p); }
QK_INLINE void store(float* p, VF v) { store_raw(p, v); }

// a * b + c, fused where the set has it.
QK_INLINE VF fma(VF a, VF b, VF c) {
#if defined(QK_NATIVE_AVX512)
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(QK_ISA_AVX512)
  typedef float Half __attribute__((vector_size(32)));
  VF out;
  for (int i = 0; i < 2; i++) {
    const Half r = (Half)_mm256_fmadd_ps(_mm256_loadu_ps((const float*)&a + 8 * i),
                                         _mm256_loadu_ps((const float*)&b + 8 * i),
                                         _mm256_loadu_ps((const float*)&c + 8 * i));
    std::memcpy((char*)&out + 32 * i, &r, 32);
  }
  return out;
#elif defined(QK_ISA_AVX2)
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
QK_INLINE VF vmax(VF a, VF b) { return a > b ? a : b; }
QK_INLINE VF vmin(VF a, VF b) { return a < b ? a : b; }
QK_INLINE VF vabs(VF a) { return (VF)((VI)a & splat_i(0x7fffffff)); }
QK_INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }
// To the nearest integer, ties to even; |v| < 2^22.
QK_INLINE VI round_int(VF v) {
  const VF magic = splat(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are the integer
  return (VI)(v + magic) - (VI)magic;
}

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

// Lane i with lane i + n by op, for n = W / 2, W / 4 .. 1. Lane 0 of the result has them all.
template <class V4, class V, class Op>
QK_INLINE V4 fold(V v, Op op) {
  V4 part[W / 4];
  std::memcpy(part, &v, sizeof v);
  for (int n = W / 8; n > 0; n /= 2)
    for (int i = 0; i < n; i++) part[i] = op(part[i], part[i + n]);
  V4 all = op(part[0], __builtin_shuffle(part[0], I4{2, 3, 0, 1}));
  return op(all, __builtin_shuffle(all, I4{1, 0, 3, 2}));
}
QK_INLINE float reduce_add(VF v) {
  return fold<F4>(v, [](auto a, auto b) { return a + b; })[0];
}
QK_INLINE float reduce_max(VF v) {
  return fold<F4>(v, [](auto a, auto b) { return a > b ? a : b; })[0];
}

// What exp is made of: 2^n times a degree-6 polynomial of the rest, n = round(x / ln 2).
struct ExpParts {
  VF p;
  VI n;
};
QK_INLINE ExpParts exp_parts(VF x) {
  const VI n = round_int(x * splat(1.44269504f));
  const VF nf = to_float(n);
  VF r = fma(nf, splat(-0.693145752f), x);
  r = fma(nf, splat(-1.42860677e-6f), r);
  VF p = splat(1.3888889e-3f);
  p = fma(p, r, splat(8.3333333e-3f));
  p = fma(p, r, splat(4.1666667e-2f));
  p = fma(p, r, splat(1.6666667e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  return {p, n};
}

// exp to 2 ulp; 0 below -87.3, +inf above 88.7; NaN stays.
QK_INLINE VF vexp(VF x) {
  const ExpParts e = exp_parts(vmin(vmax(x, splat(-87.3f)), splat(88.7f)));
  // 2^n in two factors, so that n = 128 does not overflow the exponent before the product does.
  const VI half = e.n >> 1;
  const VF scaled = e.p * (VF)((half + 127) << 23) * (VF)((e.n - half + 127) << 23);
  const VF low = x < splat(-87.3f) ? splat(0.f) : scaled;
  const VF high = x > splat(88.7f) ? splat(__builtin_inff()) : low;
  return x == x ? high : x;
}
// The same bits where x <= 0; NaN stays NaN.
QK_INLINE VF vexp_negative(VF x) {
  const VF least = splat(-87.3f);
  const ExpParts e = exp_parts(x < least ? least : x);
  const VF scaled = e.p * (VF)((e.n + 127) << 23);
  return x < least ? splat(0.f) : scaled;
}

QK_INLINE float half_to_float(uint16_t h) {
#if defined(QK_ISA_AVX2) || defined(QK_ISA_AVX512)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400) bits = (rest << 13) + (112u << 23);
  else {  // subnormal: an exact product with 2^-24
    const float f = float(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}
QK_INLINE uint16_t float_to_half(float f) {
#if defined(QK_ISA_AVX2) || defined(QK_ISA_AVX512)
  return _cvtss_sh(f, 0);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x1ff));  // quiet NaN
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 2^16: infinity
  if (rest < 0x38800000) {  // subnormal: let a float addition round at 2^-24
    float g;
    std::memcpy(&g, &rest, 4);
    g += 0.5f;  // the ulp of [0.5, 1) is 2^-24
    uint32_t v;
    std::memcpy(&v, &g, 4);
    return uint16_t(sign | (v - 0x3f000000));
  }
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);  // ties to even
  return uint16_t(sign | (rounded - 0x38000000) >> 13);
#endif
}
QK_INLINE float bf16_to_float(uint16_t b) {
  const uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
QK_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

QK_INLINE VF load_half(const uint16_t* p) {
#if defined(QK_NATIVE_AVX512)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(QK_ISA_AVX512)
  VF out;
  const __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
               hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
  std::memcpy(&out, &lo, 32);
  std::memcpy((char*)&out + 32, &hi, 32);
  return out;
#elif defined(QK_ISA_AVX2)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VF out = {};
  for (int i = 0; i < W; i++) out[i] = half_to_float(p[i]);
  return out;
#endif
}
QK_INLINE void store_half(uint16_t* p, VF v) {
#if defined(QK_NATIVE_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(QK_ISA_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; i++) p[i] = float_to_half(v[i]);
#endif
}
// GCC 12 splits these conversions into halves or single lanes, hence the instructions by name.
QK_INLINE VF load_bf16(const uint16_t* p) {
#if defined(QK_NATIVE_AVX512)
  return (VF)((VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(QK_ISA_AVX2)
  return (VF)((VU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  return (VF)(__builtin_convertvector(load_raw<VH>(p), VU) << 16);
#endif
}
QK_INLINE void store_bf16(uint16_t* p, VF v) {
  const VU u = (VU)v;
  const VU rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = u >> 16 | 0x40;
  store_raw(p, __builtin_convertvector(v == v ? rounded : nan, VH));
}
QK_INLINE VF load_i8(const int8_t* p) {
#if defined(QK_NATIVE_AVX512)
  return to_float((VI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(QK_ISA_AVX2)
  return to_float((VI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(load_raw<VB>(p), VF);
#endif
}

// Loads and stores by a storage type known at compile time: `Io<Dtype::f16>::load(p, i)`.
template <Dtype T>
struct Io;
template <>
struct Io<Dtype::f32> {
  using type = float;
  static QK_INLINE VF load(const float* p) { return QK_ISA::load(p); }
  static QK_INLINE void store(float* p, VF v) { QK_ISA::store(p, v); }
  static QK_INLINE float get(const float* p) { return *p; }
  static QK_INLINE void put(float* p, float v) { *p = v; }
};
template <>
struct Io<Dtype::f16> {
  using type = uint16_t;
  static QK_INLINE VF load(const uint16_t* p) { return load_half(p); }
  static QK_INLINE void store(uint16_t* p, VF v) { store_half(p, v); }
  static QK_INLINE float get(const uint16_t* p) { return half_to_float(*p); }
  static QK_INLINE void put(uint16_t* p, float v) { *p = float_to_half(v); }
};
template <>
struct Io<Dtype::bf16> {
  using type = uint16_t;
  static QK_INLINE VF load(const uint16_t* p) { return load_bf16(p); }
  static QK_INLINE void store(uint16_t* p, VF v) { store_bf16(p, v); }
  static QK_INLINE float get(const uint16_t* p) { return bf16_to_float(*p); }
  static QK_INLINE void put(uint16_t* p, float v) { *p = float_to_bf16(v); }
};

// Calls f with an Io of the type at hand: `with_type(args.type, [&](auto io) { ...
// decltype(io)::type ... })`.
template <class F>
QK_INLINE void with_type(Dtype type, F f) {
  switch (type) {
    case Dtype::f32: return f(Io<Dtype::f32>{});
    case Dtype::f16: return f(Io<Dtype::f16>{});
    case Dtype::bf16: return f(Io<Dtype::bf16>{});
  }
}

}  // namespace
}  // namespace qk::QK_ISA
