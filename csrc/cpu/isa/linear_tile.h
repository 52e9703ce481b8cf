// What every linear kernel shares: scales of a group as floats, and the epilogue. How vectors of
// codes map to rows is in linear_codes.h.
#pragma once
#include "linear_codes.h"
#include "linear_kinds.h"

namespace qk::QK_ISA {
namespace {

// Keeps v in a register here. GCC otherwise delays sums and spills the products that they wait for;
// it also stops a multiplication from being fused with the addition that follows where both
// roundings are wanted.
template <class V>
QK_INLINE void keep(V& v) {
#if defined(__x86_64__) && defined(QK_ISA_AVX512) && !defined(QK_NATIVE_AVX512)
  asm volatile("" : "+m"(v));  // emulated: wider than a register
#elif defined(__x86_64__) && defined(QK_ISA_AVX512)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

QK_INLINE VI load_u8(const uint8_t* p) {
#if defined(QK_NATIVE_AVX512)
  return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(QK_ISA_AVX2)
  return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  return __builtin_convertvector(load_raw<Bytes>(p), VI);
#endif
}

// As in decode.h, lane by lane: 2^(e - 127), where 0 is the subnormal 2^-127 and 255 is NaN.
QK_INLINE VF e8m0_to_float(VI e) {
  const VI bits = e == 0 ? splat_i(0x00400000) : e << 23;
  return (VF)(e == 255 ? splat_i(0x7fc00000) : bits);
}
// Sign, 4 bits of exponent with bias 7, 3 of mantissa. The fields of a float32 with an exponent
// that is too small by 120, subnormals too; the product with 2^120 is exact.
QK_INLINE VF e4m3_to_float(VI b) {
  const VI magnitude = b & 0x7f;
  // Not a product with 2^120 of the shifted bits: that is 0 where subnormals are flushed.
  const VF subnormal = to_float(magnitude) * splat(0.001953125f);  // units of 2^-9
  const VI bits = magnitude < 8 ? (VI)subnormal : (magnitude << 20) + (120 << 23);
  return (VF)((magnitude == 0x7f ? splat_i(0x7fc00000) : bits) | (b & 0x80) << 24);
}

// Scales and zeros of rows at .. at + W - 1 of one group; `at` and `block_at` index scale and
// block_scale.
struct GroupScale {
  VF scale, zero;
};
template <Zero Z>
QK_HOT GroupScale load_group(const Weight& w, int64_t at, int64_t block_at) {
  constexpr bool minimum = Z == Zero::minimum;
  GroupScale out{splat(0.f), splat(0.f)};
  if (__builtin_expect(w.scale_kind == Scale::f16, 1)) {  // a jump less for what most weights have
    out.scale = load_half((const uint16_t*)w.scale + at);
    if (minimum) out.zero = load_half((const uint16_t*)w.zero + at);
    if (Z == Zero::integer) out.zero = to_float(load_u8((const uint8_t*)w.zero + at));
    return out;
  }
  switch (w.scale_kind) {
    case Scale::f16: break;  // above
    case Scale::f32:
      out.scale = load((const float*)w.scale + at);
      if (minimum) out.zero = load((const float*)w.zero + at);
      break;
    case Scale::bf16:
      out.scale = load_bf16((const uint16_t*)w.scale + at);
      if (minimum) out.zero = load_bf16((const uint16_t*)w.zero + at);
      break;
    case Scale::two_level:
      out.scale = load_half(w.block_scale + block_at) * load_i8((const int8_t*)w.scale + at);
      if (minimum)
        out.zero = load_half(w.block_zero + block_at) * load_i8((const int8_t*)w.zero + at);
      break;
    case Scale::two_nibble: {
      const VI pair = load_u8((const uint8_t*)w.scale + at);  // 16 * minimum + scale
      out.scale = load_half(w.block_scale + block_at) * to_float(pair & 15);
      if (minimum) out.zero = load_half(w.block_zero + block_at) * to_float(pair >> 4);
      break;
    }
    case Scale::e8m0:
      out.scale = e8m0_to_float(load_u8((const uint8_t*)w.scale + at));
      if (minimum) out.zero = e8m0_to_float(load_u8((const uint8_t*)w.zero + at));
      break;
    case Scale::e4m3:
      out.scale = e4m3_to_float(load_u8((const uint8_t*)w.scale + at));
      if (minimum) out.zero = e4m3_to_float(load_u8((const uint8_t*)w.zero + at));
      break;
  }
  if (Z == Zero::integer) out.zero = to_float(load_u8((const uint8_t*)w.zero + at));
  return out;
}

// The blocks of 64 rows that a thread's share touches; the first and the last may be halves of one.
struct RowBlocks {
  Range halves;

  RowBlocks(const Team& team, int thread, int64_t n) : halves(team.share_rows_of(thread, n)) {}
  int64_t count() const {
    return halves.begin < halves.end ? (halves.end + 1) / 2 - halves.begin / 2 : 0;
  }
  struct Block {
    int64_t index;    // of the block in the weight
    int first, last;  // its halves first .. last - 1
  };
  Block at(int64_t i) const {
    const int64_t index = halves.begin / 2 + i;
    return {index, int(index * 2 < halves.begin), index * 2 + 1 < halves.end ? 2 : 1};
  }
};

// y[token + t][row_of(r) + lane] = acc + bias + residual for `rows` vectors and `tokens` tokens;
// rows from N on are not written. acc [rows][tokens][W].
__attribute__((noinline)) void write_tile(const LinearArgs& a, const float* acc, const int* row_of,
                                          int64_t first_row, int rows, int64_t token, int tokens) {
  const float* bias = (const float*)a.bias;
  with_type(a.y_type, [&](auto io) {
    using Y = decltype(io);
    typename Y::type* y = (typename Y::type*)a.y + token * a.y_stride;
    const typename Y::type* residual = (const typename Y::type*)a.residual;
    if (residual) residual += token * a.residual_stride;
    for (int r = 0; r < rows; r++) {
      const int64_t row = first_row + row_of[r];
      if (row + W <= a.w.n) {
        for (int t = 0; t < tokens; t++) {
          VF v = load(acc + (r * tokens + t) * W);
          if (bias) v += load(bias + row);
          if (residual) v += Y::load(residual + t * a.residual_stride + row);
          Y::store(y + t * a.y_stride + row, v);
        }
      } else {
        for (int t = 0; t < tokens; t++)
          for (int64_t n = row; n < a.w.n; n++) {
            float v = acc[(r * tokens + t) * W + (n - row)];
            if (bias) v += bias[n];
            if (residual) v += Y::get(residual + t * a.residual_stride + n);
            Y::put(y + t * a.y_stride + n, v);
          }
      }
    }
  });
}

}  // namespace
}  // namespace qk::QK_ISA
