// y = x @ w.T with float activations: weights are dequantized exactly, in float32, and products are
// accumulated in float32, in the order of the columns whatever M is.
//
// A thread dequantizes 64 rows x kPanelCols columns into a panel [columns, 64] that stays in L1,
// multiplies it with every token of a block, and keeps the sums [tokens, 64] in its scratch between
// panels.
#pragma once
#include "linear_tile.h"

namespace qk::QK_ISA {
namespace {

#if defined(QK_ISA_AVX512)
constexpr int kFloatTile = 8;
constexpr int float_vectors(int tokens) { return 2; }
#else
constexpr int kFloatTile = 6;
// Row vectors of a tile: at most 12 accumulators of the 16 registers.
constexpr int float_vectors(int tokens) { return tokens <= 3 ? 4 : 2; }
#endif

// Columns k .. k + cols - 1 (multiples of 16) of halves first .. last - 1 of a block, as panel
// [cols, 64].
template <class C, Zero Z>
void dequantize_panel(const Weight& w, int64_t block, int first, int last, int64_t k, int cols,
                      float* panel) {
  constexpr int V = C::vectors, half = C::half_pieces;
  const VF middle = splat(C::table ? 0.f : float(1 << (C::bits - 1)));
  Levels levels{};
  if (C::table) levels = load_raw<Levels>(w.table);
  for (int u = 0; u < cols; u += 16) {
    const uint8_t* unit = w.codes + layout::unit_offset(block * 64, k + u, w.kp, C::bits);
    const int64_t at = layout::group_index(block * 64, (k + u) / w.group, w.kp / w.group);
    const int64_t block_at = w.block_scale
                                 ? layout::group_index(block * 64, (k + u) / layout::kBlockGroup,
                                                       w.kp / layout::kBlockGroup)
                                 : 0;
    const uint8_t* planes[2];
    piece_planes<C>(unit, 0, planes);
    for (int piece = first * half; piece < last * half; piece++) {
      GroupScale group[V];
      for (int v = 0; v < V; v++) {
        const int row = piece_row<C>(piece, v);
        group[v] = load_group<Z>(w, at + row, block_at + row);
        if (Z == Zero::symmetric) group[v].zero = middle;
      }
      for (int i = 0; i < 4; i++) {
        const RawPiece<C> raw = load_piece<C>(planes, piece, i);
        QK_UNROLL(2)
        for (int v = 0; v < V; v++) {
          const VC found = piece_codes<C>(raw, v);
          const VU codes = (VU)(C::table ? look_up(levels, found) : found);
          QK_UNROLL(4)
          for (int j = 0; j < 4; j++) {
            const VI code =
                C::table ? (VI)(codes << (24 - 8 * j)) >> 24 : (VI)(codes >> (8 * j) & 255);
            VF value;
            if (Z == Zero::minimum) {
              VF scaled = group[v].scale * to_float(code);
              keep(scaled);  // two roundings, as scale * code - minimum is defined
              value = scaled - group[v].zero;
            } else {
              value = group[v].scale * (to_float(code) - group[v].zero);
            }
            store(panel + (u + 4 * i + j) * 64 + piece_row<C>(piece, v), value);
          }
        }
      }
    }
  }
  // GCC 12 takes this function for one without effects (AVX-512, codes of 3 and 6 bits) and drops
  // calls of it: its loops' pointers are differences by then. Not where there is an asm.
  asm volatile("" : : : "memory");
}

// sums[t][row] += panel[k][row] * x[t][k] for T tokens and the rows of R vectors.
template <int R, int T>
QK_INLINE void float_tile(const float* panel, int cols, const float* x, int64_t x_stride,
                          float* sums) {
  VF acc[R][T];
  QK_UNROLL(4)
  for (int r = 0; r < R; r++) QK_UNROLL(8)
  for (int t = 0; t < T; t++) acc[r][t] = load(sums + t * 64 + r * W);
  for (int k = 0; k < cols; k++, panel += 64) {
    VF w[R];
    QK_UNROLL(4)
    for (int r = 0; r < R; r++) w[r] = load(panel + r * W);
    QK_UNROLL(8)
    for (int t = 0; t < T; t++) {
      const VF one = splat(x[t * x_stride + k]);
      QK_UNROLL(4)
      for (int r = 0; r < R; r++) acc[r][t] = fma(w[r], one, acc[r][t]);
    }
  }
  QK_UNROLL(4)
  for (int r = 0; r < R; r++) QK_UNROLL(8)
  for (int t = 0; t < T; t++) store(sums + t * 64 + r * W, acc[r][t]);
}

template <int T>
__attribute__((noinline)) void float_rows(const float* panel, int cols, const float* x,
                                          int64_t x_stride, float* sums, int first_row,
                                          int last_row) {
  constexpr int R = float_vectors(T);
  for (int row = first_row; row < last_row; row += R * W)
    float_tile<R, T>(panel + row, cols, x, x_stride, sums + row);
}

template <class C, Zero Z>
void float_block(const LinearArgs& a, const float* x, int64_t x_stride, int64_t block, int first,
                 int last, float* panel, float* sums) {
  int row_of[64 / W];
  for (int r = 0; r < 64 / W; r++) row_of[r] = r * W;
  for (int64_t token = 0; token < a.m; token += kFloatTokenBlock) {
    const int64_t end = token + kFloatTokenBlock < a.m ? token + kFloatTokenBlock : a.m;
    for (int64_t i = 0; i < (end - token) * 64; i++) sums[i] = 0.f;
    for (int64_t k = 0; k < a.w.k; k += kPanelCols) {
      const int cols = int(a.w.k - k < kPanelCols ? a.w.k - k : kPanelCols);
      dequantize_panel<C, Z>(a.w, block, first, last, k, int(layout::round_up(cols, 16)), panel);
      for (int64_t t = token; t < end;) {
        const int tile = int(end - t < kFloatTile ? end - t : kFloatTile);
        const float* from = x + t * x_stride + k;
        float* to = sums + (t - token) * 64;
        switch (tile) {
          case 1: float_rows<1>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
          case 2: float_rows<2>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
          case 3: float_rows<3>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
          case 4: float_rows<4>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
          case 5: float_rows<5>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
          case 6: float_rows<6>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
#if defined(QK_ISA_AVX512)
          case 7: float_rows<7>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
          case 8: float_rows<8>(panel, cols, from, x_stride, to, 32 * first, 32 * last); break;
#endif
        }
        t += tile;
      }
    }
    for (int64_t t = token; t < end; t++)
      write_tile(a, sums + (t - token) * 64 + 32 * first, row_of, block * 64 + 32 * first,
                 32 * (last - first) / W, t, 1);
  }
}

template <class C, Zero Z>
void float_linear(const FloatProblem& p, Team& team) {
  const LinearArgs& a = p.args;
  team.deal(
      a.own_rows, [&](int thread) { return RowBlocks(team, thread, a.w.n).count(); },
      [&](int thread, int64_t piece) {
        const RowBlocks::Block rows = RowBlocks(team, thread, a.w.n).at(piece);
        float_block<C, Z>(a, p.x, p.x_stride, rows.index, rows.first, rows.last, p.panel,
                          p.panel + kPanelFloats);
      });
}

template <class C>
void float_linear(const FloatProblem& p, Team& team) {
  if constexpr (C::table) return float_linear<C, Zero::symmetric>(p, team);
  switch (p.args.w.zero_kind) {
    case Zero::symmetric: return float_linear<C, Zero::symmetric>(p, team);
    case Zero::integer: return float_linear<C, Zero::integer>(p, team);
    case Zero::minimum: return float_linear<C, Zero::minimum>(p, team);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
