// Integer dot products where the set has no u8 x s8 dot product of its own: AVX2 (vpmaddubsw) and
// the scalar path.
//
// Codes are taken a nibble at a time, so that 16-bit sums suffice: a lane adds 8 products of pairs
// in 32 columns, at most 8 * 2 * 15 * 128 = 30720 < 2^15. Bytes are two such nibbles, the high one
// widened by 16.
#pragma once
#include "linear_tile.h"

namespace qk::QK_ISA {
namespace {

typedef int16_t VS __attribute__((vector_size(4 * W)));

#if defined(QK_ISA_AVX2)
// Tokens of the next tile: 5 are better split 3 + 2 than 4 + 1.
constexpr int next_tile(int64_t remaining) {
  return remaining == 5 ? 3 : remaining > 4 ? 4 : int(remaining);
}
// Pieces of a tile of T tokens. Small T is bound by memory: read a block's bytes in order, as whole
// units.
template <int Bits>
constexpr int tile_pieces(int tokens) {
  return tokens <= 2 ? 2 * kHalfPieces<Bits> : 1;
}
// Pieces whose 16-bit sums are in registers at once.
constexpr int register_pieces(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }

QK_INLINE VS mul_pairs(VC nibbles, VI x) {
  return (VS)_mm256_maddubs_epi16((__m256i)nibbles, (__m256i)x);
}
template <int Factor>
QK_INLINE VI widen_pairs(VS sums) {
  return (VI)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(Factor));
}
#else
constexpr int next_tile(int64_t remaining) {
  return remaining >= 4 ? 4 : remaining >= 2 ? 2 : int(remaining);
}
template <int Bits>
constexpr int tile_pieces(int tokens) {
  return tokens == 1 ? 2 : 1;
}
constexpr int register_pieces(int tokens) { return tokens == 1 ? 2 : 1; }

// Words hold columns (even, odd) as bytes; the sum of both products fits 16 bits.
QK_INLINE VS mul_pairs(VC nibbles, VI x) {
  const VS even = (VS)x << 8 >> 8, odd = (VS)x >> 8;
  return (VS)((VW)nibbles & 255) * even + (VS)((VW)nibbles >> 8) * odd;
}
template <int Factor>
QK_INLINE VI widen_pairs(VS sums) {
  return (((VI)sums << 16 >> 16) + ((VI)sums >> 16)) * Factor;
}
#endif

// d[r][t] += sum over 16 * Units columns of codes * activations, for P pieces (R row vectors) x T
// tokens. w: the first piece in its unit; x [T, kx]: activations of those columns.
template <int Bits, int P, int T, int Units, int R>
QK_INLINE void dot_run(const uint8_t* w, const int8_t* x, int64_t kx, VI (&d)[R][T]) {
  static_assert(Units <= 2, "16-bit sums hold 32 columns");
  constexpr int C = register_pieces(T) < P ? register_pieces(T) : P;
#pragma GCC unroll 1
  for (int first = 0; first < P; first += C) {
    const uint8_t* from = w + piece_byte<Bits>(first);
    VS sum[C][2][T];
    QK_UNROLL(8)
    for (int i = 0; i < 4 * Units; i++) QK_UNROLL(4)
    for (int z = 0; z < C; z++) {
      const VC v =
          load_raw<VC>(from + i / 4 * layout::unit_bytes(Bits) + i % 4 * 64 + piece_byte<Bits>(z));
      const VC low = v & 15, high = (VC)((VW)v >> 4) & 15;
      QK_UNROLL(4)
      for (int t = 0; t < T; t++) {
        const VI four = splat_four(x + t * kx + 4 * i);
        if (i == 0) {
          sum[z][0][t] = mul_pairs(low, four);
          sum[z][1][t] = mul_pairs(high, four);
        } else {
          sum[z][0][t] += mul_pairs(low, four);
          sum[z][1][t] += mul_pairs(high, four);
        }
        keep(sum[z][0][t]), keep(sum[z][1][t]);
      }
    }
    QK_UNROLL(4)
    for (int z = 0; z < C; z++) QK_UNROLL(4)
    for (int t = 0; t < T; t++) {
      if constexpr (Bits == 4) {
        d[2 * (first + z)][t] += widen_pairs<1>(sum[z][0][t]);
        d[2 * (first + z) + 1][t] += widen_pairs<1>(sum[z][1][t]);
      } else {
        d[first + z][t] += widen_pairs<1>(sum[z][0][t]) + widen_pairs<16>(sum[z][1][t]);
      }
    }
  }
}

// Units: the 16 columns of a span, if known (1 or 2), else 0 and `units` says it.
template <int Bits, int P, int T, int Units, int R>
QK_INLINE void dot_span(const uint8_t* w, const int8_t* x, int64_t kx, int units, VI (&d)[R][T]) {
  if constexpr (Units > 0) {
    if (T <= 2) prefetch_units<Bits, P, Units>(w);
    dot_run<Bits, P, T, Units>(w, x, kx, d);
  } else {
#pragma GCC unroll 1
    for (; units >= 2; units -= 2, w += 2 * layout::unit_bytes(Bits), x += 32) {
      if (T <= 2) prefetch_units<Bits, P, 2>(w);
      dot_run<Bits, P, T, 2>(w, x, kx, d);
    }
    if (units) {
      if (T <= 2) prefetch_units<Bits, P, 1>(w);
      dot_run<Bits, P, T, 1>(w, x, kx, d);
    }
  }
}

}  // namespace
}  // namespace qk::QK_ISA
