// Tiles of integer pages on AVX-512 VNNI: both products of attention in integers.
//
// Queries, once per block of rows, and weights, once per tile, become 16-bit numbers: x ~= step *
// fixed with |fixed| <= limit, as two signed bytes, fixed = 256 high + low. So a product with codes
// is two vpdpbusd, exact, in any order. Queries are rounded to 2^-16 of the largest of a row (2^-15
// from 257 dims on). Weights are rounded to 2^-16 of the largest of a tile, and what is cut off one
// is added to the one 16 keys on, so that many small ones are not lost: at most half a step in each
// of 16 lanes, 1/16 of the step between values of the largest weight's key.
//
// vpdpbusd adds four neighbours, so the tile is copied into the order in which it is read, four
// keys at a time: four dims of a key beside each other for scores, four keys of a dim for the
// weighted sum. A vector has 16 dims in each 128 bits, so that shuffles stay within them; scores
// add the four up at the end.
#pragma once
#include "attention_tile.h"
#include "dot_four.h"
#include "quantize.h"

#if defined(QK_ISA_AVX512)

namespace qk::QK_ISA {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kQuads = kTile / 4;  // four keys
// A block of 64 dims of a tile, and the two bytes of a row of queries in it: [2, 4, 64].
constexpr int kBlockBytes = kQuads * 4 * kVectorBytes, kQueryBytes = 2 * 4 * kVectorBytes;
constexpr int kWeightLimit = 32638;  // 127 * 256 + 127, less what a rest can add
constexpr int kQueryLimit = 32639;
// 255 * limit * dim fits into 31 bits.
QK_INLINE int query_limit(int64_t dim) { return dim <= 256 ? kQueryLimit : 16319; }

QK_INLINE int64_t query_bytes(int64_t dim) { return ceil_div(dim, 64) * kQueryBytes; }

// ---- shuffles ----

// Elements of `Bytes` from the low or the high halves of every 128 bits of a and b, in turn.
template <int Bytes, bool High>
QK_INLINE VI interleave(VI a, VI b) {
#if defined(QK_NATIVE_AVX512)
  const __m512i x = (__m512i)a, y = (__m512i)b;
  if constexpr (Bytes == 1)
    return (VI)(High ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y));
  else if constexpr (Bytes == 2)
    return (VI)(High ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
  else if constexpr (Bytes == 4)
    return (VI)(High ? _mm512_unpackhi_epi32(x, y) : _mm512_unpacklo_epi32(x, y));
  else return (VI)(High ? _mm512_unpackhi_epi64(x, y) : _mm512_unpacklo_epi64(x, y));
#else
  VI out;
  for (int lane = 0; lane < 4; lane++)
    for (int i = 0; i < 8 / Bytes; i++) {
      const int from = 16 * lane + (High ? 8 : 0) + i * Bytes, to = 16 * lane + 2 * i * Bytes;
      std::memcpy((char*)&out + to, (const char*)&a + from, Bytes);
      std::memcpy((char*)&out + to + Bytes, (const char*)&b + from, Bytes);
    }
  return out;
#endif
}

// The 128 bits i of x[j] <-> those j of x[i].
QK_INLINE void transpose_quarters(VI (&x)[4]) {
#if defined(QK_NATIVE_AVX512)
  const __m512i a = _mm512_shuffle_i32x4((__m512i)x[0], (__m512i)x[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4((__m512i)x[2], (__m512i)x[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4((__m512i)x[0], (__m512i)x[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4((__m512i)x[2], (__m512i)x[3], 0xee);
  x[0] = (VI)_mm512_shuffle_i32x4(a, b, 0x88), x[1] = (VI)_mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = (VI)_mm512_shuffle_i32x4(c, d, 0x88), x[3] = (VI)_mm512_shuffle_i32x4(c, d, 0xdd);
#else
  VI out[4];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) std::memcpy((I4*)&out[i] + j, (const I4*)&x[j] + i, 16);
  std::memcpy(x, out, sizeof out);
#endif
}

// Up to 64 dims of a key, a code per byte; those from `left`, a multiple of 16, on are 0.
template <class Row>
QK_INLINE VI load_codes(const char* p, int64_t left) {
#if defined(QK_NATIVE_AVX512)
  const bool whole = left >= 64;
  if constexpr (Row::bits == 8) {
    if (whole) return load_raw<VI>(p);
    return (VI)_mm512_maskz_loadu_epi32(__mmask16((1 << left / 4) - 1), p);
  } else {  // the same 8 bytes twice: low nibbles, then high ones
    const __m256i half = whole ? _mm256_loadu_si256((const __m256i*)p)
                               : _mm256_maskz_loadu_epi32(__mmask8((1 << left / 8) - 1), p);
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0),
                                                   _mm512_castsi256_si512(half));
    return (VI)_mm512_and_si512(_mm512_mask_srli_epi32(twice, 0xcccc, twice, 4),
                                _mm512_set1_epi8(15));
  }
#else
  VI out{};
  char* to = (char*)&out;
  for (int64_t d = 0; d < (left < 64 ? left : 64); d++) {
    const uint8_t byte = uint8_t(Row::bits == 8 ? p[d] : p[d / 16 * 8 + d % 8]);
    to[d] = char(Row::bits == 8 ? byte : d % 16 < 8 ? byte & 15 : byte >> 4);
  }
  return out;
#endif
}

// ---- the tile in the order of the products ----

// Fours of keys [begin, end) -> [D / 64, kQuads, 4, 64]. Keys: vector i of a block has, in its 128
// bits l, dims 16 l + 4 i .. + 3 of the keys one after the other. Values: those dims one after the
// other, of four keys each.
template <class Row, bool Keys>
QK_HOT void order_tile(const char* rows, int64_t stride, int64_t begin, int64_t end, int64_t dim,
                       uint8_t* out, const char* next) {
  constexpr int N = Keys ? 4 : 1;
  for (int64_t quad = begin; quad < end; quad++) {
    QK_UNROLL(4)
    for (int i = 0; i < 4; i++) fetch_row<Row>(next, 4 * quad + i, stride, dim);
    const char* from = rows + 4 * quad * stride;
    uint8_t* to = out + quad * 4 * kVectorBytes;
    for (int64_t d = 0; d < dim; d += 64, from += Row::bytes(64), to += kBlockBytes) {
      VI y[4];
      QK_UNROLL(4)
      for (int i = 0; i < 4; i++) y[i] = load_codes<Row>(from + i * stride, dim - d);
      const VI a = interleave<N, false>(y[0], y[1]), b = interleave<N, false>(y[2], y[3]);
      const VI e = interleave<N, true>(y[0], y[1]), f = interleave<N, true>(y[2], y[3]);
      store_raw(to, interleave<2 * N, false>(a, b));
      store_raw(to + kVectorBytes, interleave<2 * N, true>(a, b));
      store_raw(to + 2 * kVectorBytes, interleave<2 * N, false>(e, f));
      store_raw(to + 3 * kVectorBytes, interleave<2 * N, true>(e, f));
    }
  }
}

// ---- 16-bit numbers ----

// step is NaN where a value is not finite, so that it reaches the result.
struct Fixed {
  float step, inverse;
};
QK_INLINE Fixed fixed_for(VI top, int limit) {
  const float most = max_magnitude(top);
  if (!(most <= 3.402823466e38f)) return {__builtin_nanf(""), 0.f};
  if (most < kTiny) return {0.f, 0.f};
  return {most / float(limit), float(limit) / most};
}
struct TwoBytes {
  VB high, low;
};
QK_INLINE TwoBytes two_bytes(VI fixed) {
  const VI low = fixed << 24 >> 24;
  return {__builtin_convertvector((fixed - low) >> 8, VB), __builtin_convertvector(low, VB)};
}

// A row of queries [D] -> [D / 64, 2, 4, 64] bytes, high ones first: vector i has in its 128 bits l
// dims 16 l + 4 i .. + 3, four times. Sets q_sum to what the numbers add up to.
QK_INLINE void fix_query(Work& w, int r, int64_t dim) {
  const float* q = w.q + r * dim;
  VI top{}, sum{};
  for (int64_t d = 0; d < dim; d += W) top = max_i(top, magnitude(load(q + d)));
  const Fixed f = fixed_for(top, query_limit(dim));
  int8_t* out = w.fixed + r * query_bytes(dim);
  if (dim % 64) std::memset(out, 0, size_t(query_bytes(dim)));
  for (int64_t d = 0; d < dim; d += W) {
    const VI fixed = f.inverse == 0.f ? VI{} : round_int(load(q + d) * splat(f.inverse));
    sum += fixed;
    const TwoBytes b = two_bytes(fixed);
    int32_t high[4], low[4];
    std::memcpy(high, &b.high, 16), std::memcpy(low, &b.low, 16);
    int8_t* to = out + d / 64 * kQueryBytes + d % 64;
    for (int i = 0; i < 4; i++, to += kVectorBytes) {
      store_raw(to, I4{} + high[i]);
      store_raw(to + 4 * kVectorBytes, I4{} + low[i]);
    }
  }
  w.q_step[r] = f.step;
  w.q_sum[r] = f.step * float(fold<I4>(sum, [](auto a, auto b) { return a + b; })[0]);
}

// Weights of R rows, lanes [v0, v1), with `top` their largest bits -> [R, 2, kTile] and their
// steps. Sets the rows' shifts to what these weights mean.
template <int R>
QK_INLINE void fix_weights(Work& w, int r0, const VI (&top)[R], int64_t v0, int64_t v1, int8_t* out,
                           float (&step)[R]) {
  const float* s = w.s + r0 * kTile;
  VF inverse[R], rest[R] = {}, sum[R] = {};
  QK_UNROLL(3)
  for (int r = 0; r < R; r++) {
    const Fixed f = fixed_for(top[r], kWeightLimit);
    step[r] = f.step, inverse[r] = splat(f.inverse);
  }
  for (int64_t t = v0; t < v1; t += W) {
    const VF zero = load(w.v_zero + t);
    QK_UNROLL(3)
    for (int r = 0; r < R; r++) {
      // A weight that is not finite becomes 0, as all others do beside it; the step is NaN then.
      const VF weight = load(s + r * kTile + t);
      const VF exact = fma(inverse[r] == VF{} ? VF{} : weight, inverse[r], rest[r]);
      const VI fixed = round_int(exact);
      rest[r] = exact - to_float(fixed);
      // Keys that the row does not see may have any zero point.
      sum[r] += fixed == 0 ? VF{} : to_float(fixed) * zero;
      const TwoBytes b = two_bytes(fixed);
      store_raw(out + 2 * kTile * r + t, b.high);
      store_raw(out + 2 * kTile * r + kTile + t, b.low);
    }
  }
  QK_UNROLL(3)
  for (int r = 0; r < R; r++) w.shift[r0 + r] = step[r] * reduce_add(sum[r]);
}

// ---- products ----

// s [R, 16] = q_step * (queries [R, D / 64, 2, 4, 64] . keys) for the fours of keys quad .. quad
// + 3.
template <int R>
QK_HOT void fixed_scores(const int8_t* q, const float* q_step, int64_t dim, const uint8_t* keys,
                         int64_t quad, float* s) {
  const int64_t stride = query_bytes(dim);
  VI high[R][4] = {}, low[R][4] = {};
  keys += quad * 4 * kVectorBytes;
  for (int64_t d = 0; d < dim; d += 64, keys += kBlockBytes, q += kQueryBytes) {
    QK_UNROLL(4)
    for (int i = 0; i < 4; i++) {
      VI h[R], l[R];
      QK_UNROLL(3)
      for (int r = 0; r < R; r++) {
        h[r] = load_raw<VI>(q + r * stride + kVectorBytes * i);
        l[r] = load_raw<VI>(q + r * stride + kVectorBytes * (4 + i));
      }
      QK_UNROLL(4)
      for (int k = 0; k < 4; k++) {
        const VI codes = load_raw<VI>(keys + kVectorBytes * (4 * k + i));
        QK_UNROLL(3)
        for (int r = 0; r < R; r++) {
          high[r][k] = dot_four(high[r][k], codes, h[r]);
          low[r][k] = dot_four(low[r][k], codes, l[r]);
        }
      }
    }
  }
  QK_UNROLL(3)
  for (int r = 0; r < R; r++) {
    QK_UNROLL(4)
    for (int k = 0; k < 4; k++) low[r][k] += high[r][k] << 8;
    transpose_quarters(low[r]);
    const VI sum = low[r][0] + low[r][1] + (low[r][2] + low[r][3]);
    store(s + r * kTile, to_float(sum) * splat(q_step[r]));
  }
}

// o [R, D] = o * keep - shift + step * (weights [R, 2, kTile] . values), fours of keys [begin,
// end).
template <int R>
QK_HOT void fixed_weigh(const int8_t* p, const float* step, const uint8_t* values, int64_t begin,
                        int64_t end, float* o, int64_t dim, const float* keep, const float* shift) {
  for (int64_t d = 0; d < dim; d += 64, values += kBlockBytes) {
    VI high[R][4] = {}, low[R][4] = {};
    for (int64_t quad = begin; quad < end; quad++) {
      VI codes[4];
      QK_UNROLL(4)
      for (int i = 0; i < 4; i++) codes[i] = load_raw<VI>(values + kVectorBytes * (4 * quad + i));
      QK_UNROLL(3)
      for (int r = 0; r < R; r++) {
        const int8_t* weights = p + 2 * kTile * r + 4 * quad;
        const VI h = splat_four(weights), l = splat_four(weights + kTile);
        QK_UNROLL(4)
        for (int i = 0; i < 4; i++) {
          high[r][i] = dot_four(high[r][i], codes[i], h);
          low[r][i] = dot_four(low[r][i], codes[i], l);
        }
      }
    }
    QK_UNROLL(3)
    for (int r = 0; r < R; r++) {
      QK_UNROLL(4)
      for (int i = 0; i < 4; i++) low[r][i] += high[r][i] << 8;
      transpose_quarters(low[r]);
      QK_UNROLL(4)
      for (int i = 0; i < 4; i++) {
        if (d + 16 * i >= dim) break;
        float* to = o + r * dim + d + 16 * i;
        const VF before = load(to) * splat(keep[r]) - splat(shift[r]);
        store(to, fma(splat(step[r]), to_float(low[r][i]), before));
      }
    }
  }
}

// attend_tile for integer pages.
template <class Row>
void attend_fixed_tile(Work& w, int rows, int64_t dim, const Tile& t, float softcap) {
  alignas(kVectorBytes) int8_t weights[3 * 2 * kTile];
  uint8_t* keys = reinterpret_cast<uint8_t*>(w.tile);
  uint8_t* values = keys + ceil_div(dim, 64) * kBlockBytes;
  const Range used = seen(w, t, 0, rows);
  if (used.begin >= used.end) return;
  const int64_t first = used.begin / 16 * 4, last = ceil_div(used.end, 16) * 4;
  order_tile<Row, true>(t.k, t.k_stride, first, last, dim, keys, t.next_k);
  order_tile<Row, false>(t.v, t.v_stride, first, last, dim, values, t.next_v);
  for (int r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r);
    const Range mine = seen(w, t, r, n);
    if (mine.begin >= mine.end) continue;
    const int64_t v0 = mine.begin / W * W, v1 = ceil_div(mine.end, W) * W;
    with_count(n, [&](auto count) {
      constexpr int R = decltype(count)::count;
      VI top[R];
      float step[R];
      for (int64_t v = v0; v < v1; v += W)
        fixed_scores<R>(w.fixed + r * query_bytes(dim), w.q_step + r, dim, keys, v / 4,
                        w.s + r * kTile + v);
      softmax<true>(w, r, v0, v1, t.start, softcap, top);
      fix_weights<R>(w, r, top, v0, v1, weights, step);
      fixed_weigh<R>(weights, step, values, v0 / 4, v1 / 4, w.o + r * dim, dim, w.keep + r,
                     w.shift + r);
    });
  }
}

}  // namespace
}  // namespace qk::QK_ISA

#endif
