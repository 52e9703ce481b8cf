// Integer dot products where the set has no u8 x s8 dot product of its own: AVX2 (vpmaddubsw) and
// the scalar path.
//
// Products of pairs of columns are summed in 16 bits, `run_steps` vectors of four columns at a
// time, then widened. Codes of up to 6 bits are multiplied as they are; bytes, and the values of a
// table, as two nibbles, the high one widened by 16.
#pragma once
#include "linear_tile.h"

namespace qk::QK_ISA {
namespace {

typedef int16_t VS __attribute__((vector_size(4 * W)));

#if defined(QK_ISA_AVX2)
// Pieces of a tile of T tokens. Small T is bound by memory: read a block's bytes in order, as whole
// units.
template <class C>
constexpr int tile_pieces(int tokens) {
  return tokens <= 2 ? 2 * C::half_pieces : 1;
}
// Pieces whose 16-bit sums are in registers at once.
constexpr int register_pieces(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }

QK_INLINE VS mul_pairs(VC codes, VI x) {
  return (VS)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
}
template <int Factor>
QK_INLINE VI widen_pairs(VS sums) {
  return (VI)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(Factor));
}
#else
template <class C>
constexpr int tile_pieces(int tokens) {
  return tokens == 1 ? 2 : 1;
}
constexpr int register_pieces(int tokens) { return tokens == 1 ? 2 : 1; }

// Words hold columns (even, odd) as bytes; the sum of both products fits 16 bits.
QK_INLINE VS mul_pairs(VC codes, VI x) {
  const VS even = (VS)x << 8 >> 8, odd = (VS)x >> 8;
  return (VS)((VW)codes & 255) * even + (VS)((VW)codes >> 8) * odd;
}
template <int Factor>
QK_INLINE VI widen_pairs(VS sums) {
  return (((VI)sums << 16 >> 16) + ((VI)sums >> 16)) * Factor;
}
#endif

// Vectors of four columns whose products with |x| <= 128 two 16-bit lanes can add up.
template <class C>
constexpr int run_steps() {
  constexpr bool nibbles = C::table || C::bits == 8;
  constexpr int top = nibbles ? 15 : (1 << C::bits) - 1, most = 32767 / (2 * top * 128);
  return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
}
static_assert(run_steps<Codes<4, false>>() == 8 && run_steps<Codes<5, false>>() == 4 &&
                  run_steps<Codes<6, false>>() == 2,
              "codes of 4 bits are summed over 32 columns, of 5 over 16, of 6 over 8");

// The two nibbles of value + 128 per code of a table.
struct NibbleLevels {
  Levels low, high;
};
QK_INLINE NibbleLevels nibble_levels(Levels levels) { return {levels & 15, levels >> 4}; }

// d[r][t] += sum over 16 * Units columns of codes * activations, for P pieces (R row vectors) from
// `first` x T tokens. w: the unit of the first columns; x [Units, T, 16]: activations of those
// columns.
template <class C, int P, int T, int Units, int R>
QK_INLINE void dot_run(const uint8_t* w, int first, const int8_t* x, const NibbleLevels& levels,
                       VI (&d)[R][T]) {
  constexpr int G = register_pieces(T) < P ? register_pieces(T) : P;
  constexpr int steps = run_steps<C>() < 4 * Units ? run_steps<C>() : 4 * Units;
  // Both row vectors of a piece of a table would need four sums each: they take turns.
  constexpr int turns = C::table ? 2 : 1;
#pragma GCC unroll 1
  for (int z0 = 0; z0 < P; z0 += G) {
    const uint8_t* planes[2][2];
    for (int u = 0; u < Units; u++)
      piece_planes<C>(w + u * layout::unit_bytes(C::bits), first + z0, planes[u]);
#pragma GCC unroll 1
    for (int turn = 0; turn < turns; turn++) {
      QK_UNROLL(4)
      for (int from = 0; from < 4 * Units; from += steps) {
        VS sum[G][2][T];
        QK_UNROLL(8)
        for (int i = from; i < from + steps; i++) QK_UNROLL(4)
        for (int z = 0; z < G; z++) {
          const RawPiece<C> raw = load_piece<C>(planes[i / 4], z, i % 4);
          VC part[2];
          if constexpr (C::table) {
            const VC code = piece_codes<C>(raw, turn);
            part[0] = look_up(levels.low, code), part[1] = look_up(levels.high, code);
          } else if constexpr (C::bits == 8) {
            const VC v = (VC)raw.plane[0];
            part[0] = v & 15, part[1] = (VC)((VW)v >> 4) & 15;
          } else {
            part[0] = piece_codes<C>(raw, 0), part[1] = piece_codes<C>(raw, 1);
          }
          QK_UNROLL(4)
          for (int t = 0; t < T; t++) {
            const VI four = splat_four(x + i / 4 * 16 * T + 16 * t + i % 4 * 4);
            if (i == from) {
              sum[z][0][t] = mul_pairs(part[0], four);
              sum[z][1][t] = mul_pairs(part[1], four);
            } else {
              sum[z][0][t] += mul_pairs(part[0], four);
              sum[z][1][t] += mul_pairs(part[1], four);
            }
            keep(sum[z][0][t]), keep(sum[z][1][t]);
          }
        }
        QK_UNROLL(4)
        for (int z = 0; z < G; z++) QK_UNROLL(4)
        for (int t = 0; t < T; t++) {
          if constexpr (C::table || C::bits == 8) {
            const int r = C::table ? 2 * (z0 + z) + turn : z0 + z;
            d[r][t] += widen_pairs<1>(sum[z][0][t]) + widen_pairs<16>(sum[z][1][t]);
          } else {
            d[2 * (z0 + z)][t] += widen_pairs<1>(sum[z][0][t]);
            d[2 * (z0 + z) + 1][t] += widen_pairs<1>(sum[z][1][t]);
          }
        }
      }
    }
  }
}

// Units: the 16 columns of a span, if known (1 or 2), else 0 and `units` says it.
template <class C, int P, int T, int Units, int R>
QK_INLINE void dot_span(const uint8_t* w, int first, const int8_t* x, int units, Levels table,
                        VI (&d)[R][T]) {
  const NibbleLevels levels = nibble_levels(table);
  if constexpr (Units > 0) {
    if (T <= 2) prefetch_units<C, P, Units>(w, first);
    dot_run<C, P, T, Units>(w, first, x, levels, d);
  } else {
#pragma GCC unroll 1
    for (; units >= 2; units -= 2, w += 2 * layout::unit_bytes(C::bits), x += 32 * T) {
      if (T <= 2) prefetch_units<C, P, 2>(w, first);
      dot_run<C, P, T, 2>(w, first, x, levels, d);
    }
    if (units) {
      if (T <= 2) prefetch_units<C, P, 1>(w, first);
      dot_run<C, P, T, 1>(w, first, x, levels, d);
    }
  }
}

}  // namespace
}  // namespace qk::QK_ISA
