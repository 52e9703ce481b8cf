// What every linear kernel shares: how vectors of codes map to rows, scales of a group as floats,
// and the epilogue.
//
// A piece is one vector of 4 W bytes of the packed layout: W rows x 4 columns. A piece of nibbles
// holds two row vectors (rows r .. r + W - 1 in the low nibbles, r + 16 .. in the high ones), a
// piece of bytes holds one. Pieces are numbered so that half a block (32 rows, the unit in which
// threads share a matrix) is a contiguous range of them, and so that the offsets of pieces first ..
// first + P - 1 do not depend on `first` when P (a power of two) divides it.
#pragma once
#include "simd.h"

#include "../../layout.h"

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

typedef uint8_t VC __attribute__((vector_size(4 * W)));   // codes: W rows x 4 columns
typedef uint16_t VW __attribute__((vector_size(4 * W)));  // the same bits as words

template <int Bits>
constexpr int kVectors = Bits == 4 ? 2 : 1;  // row vectors in a piece
template <int Bits>
constexpr int kHalfPieces = 32 / (W * kVectors<Bits>);  // pieces in 32 rows

// Offset of a piece in its unit, for columns 0 .. 3; those of columns 4 t .. 4 t + 3 are 64 t
// further.
template <int Bits>
constexpr int piece_byte(int piece) {
  constexpr int run = 16 / W;  // pieces in 64 contiguous bytes
  if (Bits == 4) return piece / run * 256 + piece % run * 4 * W;
  return piece / run % 2 * 512 + piece / (2 * run) * 256 + piece % run * 4 * W;
}
// First row, in the 64 of a block, of row vector `v` of a piece.
template <int Bits>
constexpr int piece_row(int piece, int v) {
  constexpr int run = 16 / W;
  if (Bits == 4) return piece / run * 32 + v * 16 + piece % run * W;
  return piece * W;
}

// Every byte and row that a piece claims is where layout.h has it.
template <int Bits>
constexpr bool pieces_match_layout() {
  for (int piece = 0; piece < 2 * kHalfPieces<Bits>; piece++)
    for (int v = 0; v < kVectors<Bits>; v++)
      for (int lane = 0; lane < W; lane++)
        for (int col = 0; col < 16; col++) {
          const layout::Position at = layout::position(Bits, piece_row<Bits>(piece, v) + lane, col);
          if (at.byte != piece_byte<Bits>(piece) + 64 * (col / 4) + 4 * lane + col % 4 ||
              at.shift != 4 * v)
            return false;
        }
  return true;
}
static_assert(pieces_match_layout<4>() && pieces_match_layout<8>(),
              "pieces do not follow the packed layout");

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

// Four activations in every lane.
QK_INLINE VI splat_four(const int8_t* x) { return splat_i(load_raw<int32_t>(x)); }

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

// Scales and zeros of rows at .. at + W - 1 of one group; `at` and `block_at` index scale and
// block_scale.
struct GroupScale {
  VF scale, zero;
};
template <Zero Z>
QK_HOT GroupScale load_group(const Weight& w, int64_t at, int64_t block_at) {
  constexpr bool minimum = Z == Zero::minimum;
  GroupScale out{splat(0.f), splat(0.f)};
  switch (w.scale_kind) {
    case Scale::f32:
      out.scale = load((const float*)w.scale + at);
      if (minimum) out.zero = load((const float*)w.zero + at);
      break;
    case Scale::f16:
      out.scale = load_half((const uint16_t*)w.scale + at);
      if (minimum) out.zero = load_half((const uint16_t*)w.zero + at);
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
    default: break;  // the boundary refuses e8m0 and e4m3
  }
  if (Z == Zero::integer) out.zero = to_float(load_u8((const uint8_t*)w.zero + at));
  return out;
}

// y[token + t][row_of(r) + lane] = acc + bias for `rows` vectors and `tokens` tokens; rows from N
// on are not written. acc [rows][tokens][W].
__attribute__((noinline)) void write_tile(const LinearArgs& a, const float* acc, const int* row_of,
                                          int64_t first_row, int rows, int64_t token, int tokens) {
  const float* bias = (const float*)a.bias;
  with_type(a.y_type, [&](auto io) {
    using Y = decltype(io);
    typename Y::type* y = (typename Y::type*)a.y + token * a.y_stride;
    for (int r = 0; r < rows; r++) {
      const int64_t row = first_row + row_of[r];
      if (row + W <= a.w.n) {
        for (int t = 0; t < tokens; t++) {
          VF v = load(acc + (r * tokens + t) * W);
          if (bias) v += load(bias + row);
          Y::store(y + t * a.y_stride + row, v);
        }
      } else {
        for (int t = 0; t < tokens; t++)
          for (int64_t n = row; n < a.w.n; n++)
            Y::put(y + t * a.y_stride + n,
                   acc[(r * tokens + t) * W + (n - row)] + (bias ? bias[n] : 0.f));
      }
    }
  });
}

}  // namespace
}  // namespace qk::QK_ISA
