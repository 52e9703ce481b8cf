// Integer dot products on AVX-512 VNNI: vpdpbusd adds four u8 x s8 products to an int32 lane, so
// that codes of 4 and 8 bits are used as they are, one row per lane.
#pragma once
#include "dot_four.h"
#include "linear_tile.h"

namespace qk::QK_ISA {
namespace {

// Up to 3 tokens take the 64 rows of a block, more take 32.
template <class C>
constexpr int tile_pieces(int tokens) {
  return (tokens <= 3 ? 2 : 1) * C::half_pieces;
}

// d[r][t] += sum over 16 columns, a unit, of codes * activations, for P pieces (R row vectors) from
// `first` x T tokens. x [T, 16]: activations of those columns.
template <class C, int P, int T, int R>
QK_HOT void dot_unit(const uint8_t* w, int first, const int8_t* x, Levels levels, VI (&d)[R][T]) {
  if (T <= 2) prefetch_units<C, P, 1>(w, first);
  const uint8_t* planes[2];
  piece_planes<C>(w, first, planes);
  QK_UNROLL(4)
  for (int i = 0; i < 4; i++) {
    VC codes[R];
    QK_UNROLL(4)
    for (int z = 0; z < P; z++) {
      const RawPiece<C> raw = load_piece<C>(planes, z, i);
      QK_UNROLL(2)
      for (int v = 0; v < C::vectors; v++) {
        const VC code = piece_codes<C>(raw, v);
        codes[C::vectors * z + v] = C::table ? look_up(levels, code) : code;
      }
    }
    QK_UNROLL(8)
    for (int t = 0; t < T; t++) {
      const VI four = splat_four(x + 16 * t + 4 * i);
      QK_UNROLL(4)
      for (int r = 0; r < R; r++) d[r][t] = dot_four(d[r][t], (VI)codes[r], four);
    }
  }
}

// The same over 16 * units columns. Units: the 16 columns of a span, if known, else 0 and `units`
// says it.
template <class C, int P, int T, int Units, int R>
QK_HOT void dot_span(const uint8_t* w, int first, const int8_t* x, int units, Levels levels,
                     VI (&d)[R][T]) {
  constexpr int bytes = int(layout::unit_bytes(C::bits));
  if constexpr (Units > 0) {
    QK_UNROLL(8)
    for (int u = 0; u < Units; u++) dot_unit<C, P>(w + u * bytes, first, x + u * 16 * T, levels, d);
  } else {
    QK_UNROLL(2)
    for (; units > 0; units--, w += bytes, x += 16 * T) dot_unit<C, P>(w, first, x, levels, d);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
