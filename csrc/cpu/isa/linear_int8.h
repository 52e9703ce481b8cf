// y = x @ w.T with activations quantized to int8: the driver that the instruction sets share.
// Theirs is dot_span.
//
// Columns are taken in spans of min(G, Ga): in a span both the weight and the activation have one
// scale, so its dot products are summed in int32 and turned into float once:
//   y += scale_w * scale_x * dot - zero part,   the zero part being, with sum = the activations'
//   codes added up, symmetric  scale_w * scale_x * middle * sum   (the int32 sum starts from
//   -middle * sum) integer    scale_w * scale_x * zero * sum minimum    minimum * scale_x * sum
// The middle is 2^(bits - 1). Values of a table are multiplied as value + 128, so theirs is 128.
#pragma once
#include "../weight_bytes.h"
#include "linear_tile.h"

namespace qk::QK_ISA {
namespace {

// Bytes between a load and its prefetch for M <= 2, where memory is the bound. On a Zen 3 core that
// reads 16 GB/s, 4 KB give 15.6 (4-bit codes) and 14.1 GB/s (8-bit), 16 KB give 15.4 and 10.9.
constexpr int64_t kPrefetchBytes = 4096;

// Into L2, or on AVX-512 into L1: one thread of a Zen 4 core takes 27.5 GB/s of 4-bit codes instead
// of 21.8, but 17 of 8-bit ones instead of 21.
template <class C>
QK_INLINE void prefetch_codes(const uint8_t* p) {
#if defined(QK_ISA_AVX512)
  if (C::bits < 8) return __builtin_prefetch(p + kPrefetchBytes, 0, 3);
#endif
  __builtin_prefetch(p + kPrefetchBytes, 0, 2);
}

// Asks for what P pieces from `first` of `Units` units at w will need later: whole units where the
// pieces are most of them, the lines of the nibble or byte plane else.
template <class C, int P, int Units>
QK_INLINE void prefetch_units(const uint8_t* w, int first) {
  constexpr int bytes = int(layout::unit_bytes(C::bits)), width = C::planes.plane[0].width;
  if constexpr (P == 2 * C::half_pieces || C::planes.count > 1 || width < 4) {
    QK_UNROLL(32)
    for (int i = 0; i < Units * bytes; i += 64) prefetch_codes<C>(w + i);
  } else {
    QK_UNROLL(32)
    for (int i = 0; i < 4 * Units; i++) QK_UNROLL(8)
    for (int z = 0; z < P; z++)
      if (z == 0 || piece_byte(width, z) / 64 != piece_byte(width, z - 1) / 64)
        prefetch_codes<C>(w + i / 4 * bytes + i % 4 * 64 + piece_byte(width, first) +
                          piece_byte(width, z));
  }
}

// The scales, `bytes` each, of R row vectors some groups later.
template <int R>
QK_INLINE void prefetch_group(const void* scales, int64_t at, int bytes) {
  const char* from = (const char*)scales + at * bytes + 4096;
  for (int i = 0; i < R * W * bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// The table of a weight as the dot products take it: value + 128.
QK_INLINE Levels shifted_levels(const Weight& w) {
  return load_raw<Levels>(w.table) ^ (uint8_t)128;
}

}  // namespace
}  // namespace qk::QK_ISA

#if defined(QK_ISA_AVX512)
#include "linear_int8_vnni.h"
#else
#include "linear_int8_pairs.h"
#endif

namespace qk::QK_ISA {
namespace {

// The next block of rows, its codes and scales, brought into L2 while many tokens keep the cores
// busy with this one. Every span of every tile asks for its share.
struct Ahead {
  Upcoming next;
  int lines;  // per span

  QK_INLINE void step() {
    for (int i = 0; i < lines && next.step(); i++) {
    }
  }
};

// The spans of a tile that are worked on at a time. `sums` [rows, tokens] holds what those before
// them came to, and what these make of it, unless they are the first or the last ones.
struct Spans {
  int64_t begin, end;
  float* sums;
};

// Pieces first .. first + P - 1 of a block of 64 rows, T tokens.
// Units: as for dot_span.
template <class C, Zero Z, int Units, int P, int T>
__attribute__((noinline)) void int8_tile(const Int8Problem& p, int64_t block, int first,
                                         int64_t token, Spans spans, Ahead& ahead) {
  constexpr int V = C::vectors, R = P * V;
  const LinearArgs& a = p.args;
  const int units = Units > 0 ? Units : p.span / 16;
  const int64_t span_bytes = units * layout::unit_bytes(C::bits);
  const uint8_t* w =
      a.w.codes + layout::unit_offset(block * 64, 0, a.w.kp, C::bits) + spans.begin * span_bytes;
  const int8_t* x = p.x + token * p.columns + spans.begin * p.span * T;
  const SpanTerm* terms = p.terms + token * p.spans + spans.begin * T;
  const int row = piece_row<C>(first, 0);
  const int64_t block_groups = layout::kBlockGroup / a.w.group;  // used with two-level scales only
  const int scale_bytes = scale_size(a.w.scale_kind);
  Levels levels{};
  if (C::table) levels = shifted_levels(a.w);
  VF acc[R][T];
  QK_UNROLL(16)
  for (int r = 0; r < R; r++) QK_UNROLL(8)
  for (int t = 0; t < T; t++)
    acc[r][t] = spans.begin == 0 ? splat(0.f) : load(spans.sums + (r * T + t) * W);

  const int64_t group = spans.begin / p.spans_per_group;
  int64_t at = (block * p.groups + group) * 64 + row;  // of the group's scales
  int64_t block_at = 0, group_in_block = 0;
  if (a.w.block_scale) {
    group_in_block = group % block_groups;
    block_at = (block * (a.w.kp / layout::kBlockGroup) + group / block_groups) * 64 + row;
  }
  int span_in_group = int(spans.begin % p.spans_per_group);
#pragma GCC unroll 1
  for (int64_t s = spans.begin; s < spans.end; s++, w += span_bytes, x += p.span * T, terms += T) {
    VI d[R][T];
    QK_UNROLL(16)
    for (int r = 0; r < R; r++) QK_UNROLL(8)
    for (int t = 0; t < T; t++) d[r][t] = splat_i(Z == Zero::symmetric ? terms[t].start : 0);
    dot_span<C, P, T, Units>(w, first, x, units, levels, d);
    if constexpr (T <= 2) {
      prefetch_group<R>(a.w.scale, at, scale_bytes);
      if (Z == Zero::minimum && a.w.zero) prefetch_group<R>(a.w.zero, at, scale_bytes);
    } else {
      ahead.step();
    }
    QK_UNROLL(16)
    for (int r = 0; r < R; r++) {
      const int offset = piece_row<C>(r / V, r % V);
      const GroupScale group = load_group<Z>(a.w, at + offset, block_at + offset);
      QK_UNROLL(8)
      for (int t = 0; t < T; t++) {
        const SpanTerm& term = terms[t];
        VF dot = to_float(d[r][t]);
        if (Z == Zero::integer) dot = fma(group.zero, splat(term.shift), dot);
        acc[r][t] = fma(group.scale * splat(term.scale), dot, acc[r][t]);
        if (Z == Zero::minimum) acc[r][t] = fma(group.zero, splat(term.shift), acc[r][t]);
      }
    }
    if (++span_in_group == p.spans_per_group) {
      span_in_group = 0, at += 64;
      if (++group_in_block == block_groups) group_in_block = 0, block_at += 64;
    }
  }
  if (spans.end < p.spans) {
    QK_UNROLL(16)
    for (int r = 0; r < R; r++) QK_UNROLL(8)
    for (int t = 0; t < T; t++) store(spans.sums + (r * T + t) * W, acc[r][t]);
    return;
  }
  int row_of[R];
  for (int r = 0; r < R; r++) row_of[r] = piece_row<C>(r / V, r % V);
  write_tile(a, (const float*)acc, row_of, block * 64 + row, R, token, T);
}

// The rows that a share has of a block, T tokens.
template <class C, Zero Z, int Units, int T>
void int8_rows(const Int8Problem& p, RowBlocks::Block rows, int64_t token, Spans spans,
               Ahead& ahead) {
  constexpr int half = C::half_pieces, P = tile_pieces<C>(T), first = P > half ? half : P;
  if constexpr (P > half)
    if (rows.last - rows.first == 2)
      return int8_tile<C, Z, Units, P, T>(p, rows.index, 0, token, spans, ahead);
  for (int piece = rows.first * half; piece < rows.last * half; piece += first) {
    int8_tile<C, Z, Units, first, T>(p, rows.index, piece, token, spans, ahead);
    if (spans.sums) spans.sums += first * C::vectors * T * W;
  }
}

template <class C, Zero Z, int Units>
void int8_rows(const Int8Problem& p, RowBlocks::Block rows, int64_t token, int tokens, Spans spans,
               Ahead& ahead) {
  switch (tokens) {
    case 1: return int8_rows<C, Z, Units, 1>(p, rows, token, spans, ahead);
    case 2: return int8_rows<C, Z, Units, 2>(p, rows, token, spans, ahead);
#if !defined(QK_ISA_SCALAR)
    case 3: return int8_rows<C, Z, Units, 3>(p, rows, token, spans, ahead);
#endif
    case 4: return int8_rows<C, Z, Units, 4>(p, rows, token, spans, ahead);
#if defined(QK_ISA_AVX512)
    case 6: return int8_rows<C, Z, Units, 6>(p, rows, token, spans, ahead);
#endif
  }
}

// Codes of 32 rows that stay in the second-level cache while the activations of a block of tokens
// go by. Where there are more, columns are taken in chunks, from that many tokens on. (Chunks that
// fit the first-level cache cost a tenth: tiles get too short.)
constexpr int64_t kChunkBytes = 256 << 10, kChunkTokens = 12;

// All rows of a block that a share has, tokens begin .. end - 1. last: nothing of the share
// follows.
template <class C, Zero Z, int Units>
void int8_block(const Int8Problem& p, RowBlocks::Block rows, int64_t begin, int64_t end,
                bool last) {
  const LinearArgs& a = p.args;
  const int64_t code_bytes = layout::unit_bytes(C::bits) / 2 * (p.columns / 16);
  const int64_t chunks = end - begin < kChunkTokens ? 1 : (code_bytes - 1) / kChunkBytes + 1;
  const int64_t chunk_spans = (p.spans - 1) / chunks + 1;
  const bool chunked = chunk_spans < p.spans;
  Ahead ahead{};
  if (end - begin > 2 && !last) {
    ahead.next = block_bytes(a.w, rows.index + 1, 1);
    const int pieces = (rows.last - rows.first) * C::half_pieces;
    const int most = chunked ? C::half_pieces : pieces;
    int64_t spans = 0;
    for_each_tile(begin, end, [&](int64_t, int tokens) {
      const int at_once = tile_pieces<C>(tokens) < most ? tile_pieces<C>(tokens) : most;
      spans += pieces / at_once * p.spans;
    });
    const int64_t lines = (ahead.next.bytes() / 64 + spans - 1) / spans;
    ahead.lines = spans > 64 * p.spans ? 0 : int(lines);  // many tokens leave time for it anyway
  }
  if (!chunked) {
    for_each_tile(begin, end, [&](int64_t token, int tokens) {
      int8_rows<C, Z, Units>(p, rows, token, tokens, {0, p.spans, nullptr}, ahead);
    });
    return;
  }
  alignas(64) float sums[kMostTokens * 32];
  for (int half = rows.first; half < rows.last; half++)
    for (int64_t s = 0; s < p.spans; s += chunk_spans) {
      const int64_t stop = s + chunk_spans < p.spans ? s + chunk_spans : p.spans;
      for_each_tile(begin, end, [&](int64_t token, int tokens) {
        int8_rows<C, Z, Units>(p, {rows.index, half, half + 1}, token, tokens,
                               {s, stop, sums + (token - begin) * 32}, ahead);
      });
    }
}

// A piece is a block of rows times a block of tokens; rows come first, so that the activations of
// these tokens stay in the cache.
template <class C, Zero Z, int Units>
void int8_linear(const Int8Problem& p, Team& team) {
  const LinearArgs& a = p.args;
  // 240 tokens of 4096 columns alone would fill a second-level cache of 1 MB.
  const int64_t block = p.columns < 4096 ? kMostTokens : kTokenBlock;
  const int64_t token_blocks = (a.m + block - 1) / block;
  team.deal(
      a.own_rows, [&](int thread) { return token_blocks * RowBlocks(team, thread, a.w.n).count(); },
      [&](int thread, int64_t piece) {
        const RowBlocks blocks(team, thread, a.w.n);
        const int64_t row = piece % blocks.count(), begin = piece / blocks.count() * block;
        const int64_t end = begin + block < a.m ? begin + block : a.m;
        int8_block<C, Z, Units>(p, blocks.at(row), begin, end, row + 1 == blocks.count());
      });
}

// The span that most weights of a kind have needs no loop: its sums never leave the registers. 2-,
// 3- and 6-bit K-quants have groups of 16, everything else groups of 32 as a rule. Zero points come
// with 4 and 8 bits, nearly always; the scalar set is there to be right, and to build fast.
template <class C, Zero Z>
void int8_linear(const Int8Problem& p, Team& team) {
#if defined(QK_ISA_SCALAR)
  constexpr bool worth_it = false;
#else
  constexpr bool worth_it = Z != Zero::integer || C::bits == 4 || C::bits == 8;
#endif
  constexpr int usual = C::bits == 2 || C::bits == 3 || C::bits == 6 ? 1 : 2;
#if defined(QK_ISA_AVX512)
  // Groups of 128 columns, as GPTQ and AWQ have them: one token gains an eighth.
  constexpr bool long_groups = C::bits == 4 && !C::table && Z != Zero::minimum;
  if (long_groups && p.span == 128) return int8_linear<C, Z, long_groups ? 8 : 0>(p, team);
#endif
  if (worth_it && p.span == 16 * usual) int8_linear<C, Z, worth_it ? usual : 0>(p, team);
  else int8_linear<C, Z, 0>(p, team);
}

template <class C>
void int8_linear(const Int8Problem& p, Team& team) {
  if constexpr (C::table) return int8_linear<C, Zero::symmetric>(p, team);
  switch (p.args.w.zero_kind) {
    case Zero::symmetric: return int8_linear<C, Zero::symmetric>(p, team);
    case Zero::integer: return int8_linear<C, Zero::integer>(p, team);
    case Zero::minimum: return int8_linear<C, Zero::minimum>(p, team);
  }
}

}  // namespace
}  // namespace qk::QK_ISA
