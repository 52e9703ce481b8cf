// Tiles of integer pages on AVX-512 VNNI: both products of attention in integers.
//
// Queries, once per block of rows, and weights, once per tile, become 16-bit numbers: x ~= step *
// fixed with |fixed| <= limit, as two signed bytes, fixed = 256 high + low. So a product with codes
// is two vpdpbusd, exact, in any order. Queries are rounded to 2^-16 of the largest of a row (2^-15
// from 257 dims on). Weights are rounded to 2^-16 of the largest of a tile, and what is cut off one
// is added to the one 16 keys on, so that many small ones are not lost: at most half a step in each
// of 16 lanes, 1/16 of the step between values of the largest weight's key.
//
// vpdpbusd adds four neighbours, so the tile is copied into the order in which it is read: four
// dims of a key beside each other for scores, four keys of a dim for the weighted sum.
#pragma once
#include "attention_tile.h"
#include "dot_four.h"
#include "quantize.h"

#if defined(QK_ISA_AVX512)

namespace qk::QK_ISA {
namespace {

constexpr int kGroups = kTile / 16;  // groups of 16 keys: a vector of scores
constexpr int kVectorBytes = 64;
constexpr int kWeightLimit = 32638;  // 127 * 256 + 127, less what a rest can add
constexpr int kQueryLimit = 32639;
// 255 * limit * dim fits into 31 bits.
QK_INLINE int query_limit(int64_t dim) { return dim <= 256 ? kQueryLimit : 16319; }

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

// Every 4 bytes of 16 in all lanes of one of the four 128 bits.
QK_INLINE VI spread(VB bytes) {
#if defined(QK_NATIVE_AVX512)
  const VI lane = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return (VI)_mm512_permutexvar_epi32((__m512i)lane, _mm512_castsi128_si512((__m128i)bytes));
#else
  int32_t four[4];
  std::memcpy(four, &bytes, 16);
  VI out;
  for (int i = 0; i < W; i++) out[i] = four[i / 4];
  return out;
#endif
}

// [sum of the four 128 bits of a, of b, of c, of d]
QK_INLINE VI add_quarters(VI a, VI b, VI c, VI d) {
#if defined(QK_NATIVE_AVX512)
  const auto halves = [](VI x, VI y) __attribute__((always_inline)) {
    return (VI)_mm512_shuffle_i32x4((__m512i)x, (__m512i)y, 0x44) +
           (VI)_mm512_shuffle_i32x4((__m512i)x, (__m512i)y, 0xee);
  };
  const __m512i ab = (__m512i)halves(a, b), cd = (__m512i)halves(c, d);
  return (VI)_mm512_shuffle_i32x4(ab, cd, 0x88) + (VI)_mm512_shuffle_i32x4(ab, cd, 0xdd);
#else
  const VI from[4] = {a, b, c, d};
  VI out{};
  for (int i = 0; i < W; i++)
    for (int lane = 0; lane < 4; lane++) out[i] += from[i / 4][4 * lane + i % 4];
  return out;
#endif
}

// Dims 16 c .. 16 c + 15 of 16 keys, a code per byte: 128 bits i of y[j] are key 4 i + j.
template <class Row>
QK_INLINE void gather(const char* rows, int64_t stride, int64_t c, VI (&y)[4]) {
  const char* from = rows + Row::bytes(kDims) * c;
#if defined(QK_NATIVE_AVX512)
  QK_UNROLL(4)
  for (int j = 0; j < 4; j++) {
    const auto key = [&](int i) __attribute__((always_inline)) {
      const char* p = from + (4 * i + j) * stride;
      if constexpr (Row::bits == 8) return _mm_loadu_si128((const __m128i*)p);
      else return _mm_set1_epi64x(load_raw<int64_t>(p));
    };
    __m512i all = _mm512_castsi128_si512(key(0));
    all = _mm512_inserti32x4(all, key(1), 1);
    all = _mm512_inserti32x4(all, key(2), 2);
    all = _mm512_inserti32x4(all, key(3), 3);
    if constexpr (Row::bits == 4)  // the same 8 bytes twice: low nibbles, then high ones
      all = _mm512_and_si512(_mm512_mask_srli_epi32(all, 0xcccc, all, 4), _mm512_set1_epi8(15));
    y[j] = (VI)all;
  }
#else
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 4; i++) {
      const char* p = from + (4 * i + j) * stride;
      char* to = (char*)&y[j] + 16 * i;
      if constexpr (Row::bits == 8) std::memcpy(to, p, 16);
      else
        for (int d = 0; d < 16; d++) to[d] = char(d < 8 ? p[d] & 15 : uint8_t(p[d - 8]) >> 4);
    }
#endif
}

// ---- the tile in the order of the products ----

// Groups [g0, g1) of keys -> [D / 4, kTile, 4]: four dims of a key beside each other.
template <class Row>
QK_HOT void fixed_keys(const char* k, int64_t stride, int64_t g0, int64_t g1, int64_t dim,
                       uint8_t* out, const char* next) {
  for (int64_t g = g0; g < g1; g++) {
    for (int i = 0; i < 16; i++) fetch_row<Row>(next, 16 * g + i, stride, dim);
    for (int64_t c = 0; c < dim / kDims; c++) {
      VI y[4];
      gather<Row>(k + 16 * g * stride, stride, c, y);
      const VI a = interleave<4, false>(y[0], y[1]), b = interleave<4, false>(y[2], y[3]);
      const VI d = interleave<4, true>(y[0], y[1]), e = interleave<4, true>(y[2], y[3]);
      uint8_t* to = out + (4 * c * kTile + 16 * g) * 4;
      store_raw(to, interleave<8, false>(a, b));
      store_raw(to + kTile * 4, interleave<8, true>(a, b));
      store_raw(to + kTile * 8, interleave<8, false>(d, e));
      store_raw(to + kTile * 12, interleave<8, true>(d, e));
    }
  }
}

// Groups [g0, g1) of values -> [D / 16, kGroups, 4, 64]: vector i has dims 4 i .. 4 i + 3 of its
// 16, and in its 128 bits l those of keys 4 l .. 4 l + 3, which lie beside each other.
template <class Row>
QK_HOT void fixed_values(const char* v, int64_t stride, int64_t g0, int64_t g1, int64_t dim,
                         uint8_t* out, const char* next) {
  for (int64_t g = g0; g < g1; g++) {
    for (int i = 0; i < 16; i++) fetch_row<Row>(next, 16 * g + i, stride, dim);
    for (int64_t c = 0; c < dim / kDims; c++) {
      VI y[4];
      gather<Row>(v + 16 * g * stride, stride, c, y);
      const VI a = interleave<1, false>(y[0], y[1]), b = interleave<1, false>(y[2], y[3]);
      const VI d = interleave<1, true>(y[0], y[1]), e = interleave<1, true>(y[2], y[3]);
      uint8_t* to = out + (c * kGroups + g) * 4 * kVectorBytes;
      store_raw(to, interleave<2, false>(a, b));
      store_raw(to + kVectorBytes, interleave<2, true>(a, b));
      store_raw(to + 2 * kVectorBytes, interleave<2, false>(d, e));
      store_raw(to + 3 * kVectorBytes, interleave<2, true>(d, e));
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

// A row of queries [D] in place: [D / 4, 2, 4] bytes, high ones first, in the first half of the
// row. Sets q_sum to what the numbers add up to.
QK_INLINE void fix_query(Work& w, int r, int64_t dim) {
  float* q = w.q + r * dim;
  VI top{}, sum{};
  for (int64_t d = 0; d < dim; d += W) top = max_i(top, magnitude(load(q + d)));
  const Fixed f = fixed_for(top, query_limit(dim));
  for (int64_t d = 0; d < dim; d += W) {
    const VI fixed = f.inverse == 0.f ? VI{} : round_int(load(q + d) * splat(f.inverse));
    sum += fixed;
    const TwoBytes b = two_bytes(fixed);
    const I4 high = (I4)b.high, low = (I4)b.low;
    char* to = reinterpret_cast<char*>(q) + 2 * d;
    store_raw(to, __builtin_shuffle(high, low, I4{0, 4, 1, 5}));
    store_raw(to + 16, __builtin_shuffle(high, low, I4{2, 6, 3, 7}));
  }
  w.q_step[r] = f.step;
  w.q_sum[r] = f.step * float(fold<I4>(sum, [](auto a, auto b) { return a + b; })[0]);
}

// Weights of a row, lanes [v0, v1), with `top` their largest bits -> [kGroups, 2, 64]. Returns the
// step; `zero` turns into the shift that these weights mean.
QK_INLINE float fix_weights(const float* s, VI top, const float* zero, int64_t v0, int64_t v1,
                            int8_t* out, float* shift) {
  const Fixed f = fixed_for(top, kWeightLimit);
  VF rest{}, sum{};
  for (int64_t t = v0; t < v1; t += W) {
    VI fixed{};
    if (f.inverse != 0.f) {
      const VF exact = fma(load(s + t), splat(f.inverse), rest);
      fixed = round_int(exact);
      rest = exact - to_float(fixed);
      // Keys that the row does not see may have any zero point.
      sum += fixed == 0 ? VF{} : to_float(fixed) * load(zero + t);
    }
    const TwoBytes b = two_bytes(fixed);
    store_raw(out + 8 * t, spread(b.high));
    store_raw(out + 8 * t + kVectorBytes, spread(b.low));
  }
  *shift = f.step * reduce_add(sum);
  return f.step;
}

// ---- products ----

// s [R, 16 G] = q_step * (queries [R, D] . keys [D / 4, kTile, 4]) for 16 G keys from `keys` on.
template <int R, int G>
QK_HOT void fixed_scores(const float* q, const float* q_step, int64_t dim, const uint8_t* keys,
                         float* s) {
  VI high[R][G] = {}, low[R][G] = {};
  const int8_t* x = reinterpret_cast<const int8_t*>(q);
  for (int64_t c = 0; c < dim / 4; c++, x += 8, keys += kTile * 4) {
    VI codes[G];
    QK_UNROLL(4)
    for (int g = 0; g < G; g++) codes[g] = load_raw<VI>(keys + kVectorBytes * g);
    QK_UNROLL(3)
    for (int r = 0; r < R; r++) {
      const VI h = splat_four(x + 4 * r * dim), l = splat_four(x + 4 * r * dim + 4);
      QK_UNROLL(4)
      for (int g = 0; g < G; g++) {
        high[r][g] = dot_four(high[r][g], codes[g], h);
        low[r][g] = dot_four(low[r][g], codes[g], l);
      }
    }
  }
  QK_UNROLL(3)
  for (int r = 0; r < R; r++) QK_UNROLL(4)
  for (int g = 0; g < G; g++)
    store(s + r * kTile + W * g, to_float((high[r][g] << 8) + low[r][g]) * splat(q_step[r]));
}

// o [R, D] = o * keep - shift + step * (weights [R, kGroups, 2, 64] . values)
template <int R>
QK_HOT void fixed_weigh(const int8_t* p, const float* step, const uint8_t* values, int64_t g0,
                        int64_t g1, float* o, int64_t dim, const float* keep, const float* shift) {
  for (int64_t c = 0; c < dim / kDims; c++) {
    VI high[R][4] = {}, low[R][4] = {};
    for (int64_t g = g0; g < g1; g++) {
      const uint8_t* from = values + (c * kGroups + g) * 4 * kVectorBytes;
      VI codes[4];
      QK_UNROLL(4)
      for (int i = 0; i < 4; i++) codes[i] = load_raw<VI>(from + kVectorBytes * i);
      QK_UNROLL(3)
      for (int r = 0; r < R; r++) {
        const int8_t* weights = p + (r * kGroups + g) * 2 * kVectorBytes;
        const VI h = load_raw<VI>(weights), l = load_raw<VI>(weights + kVectorBytes);
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
      const VF sum = to_float(add_quarters(low[r][0], low[r][1], low[r][2], low[r][3]));
      float* to = o + r * dim + kDims * c;
      store(to, fma(splat(step[r]), sum, load(to) * splat(keep[r]) - splat(shift[r])));
    }
  }
}

// attend_tile for integer pages.
template <class Row>
void attend_fixed_tile(Work& w, int rows, int64_t dim, const Tile& t, float softcap) {
  alignas(kVectorBytes) int8_t weights[3 * kGroups * 2 * kVectorBytes];
  uint8_t* keys = reinterpret_cast<uint8_t*>(w.tile);
  uint8_t* values = keys + kTile * dim;
  const Range used = seen(w, t, 0, rows);
  if (used.begin >= used.end) return;
  const int64_t first = used.begin / 16, last = ceil_div(used.end, 16);
  fixed_keys<Row>(t.k, t.k_stride, first, last, dim, keys, t.next_k);
  fixed_values<Row>(t.v, t.v_stride, first, last, dim, values, t.next_v);
  for (int r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r);
    const Range mine = seen(w, t, r, n);
    if (mine.begin >= mine.end) continue;
    const int64_t g0 = mine.begin / 16, g1 = ceil_div(mine.end, 16);
    with_count(n, [&](auto count) {
      constexpr int R = decltype(count)::count;
      const float *q = w.q + r * dim, *q_step = w.q_step + r;
      float *s = w.s + r * kTile, step[R];
      if (g1 - g0 == kGroups) fixed_scores<R, kGroups>(q, q_step, dim, keys, s);
      else
        for (int64_t g = g0; g < g1; g++)
          fixed_scores<R, 1>(q, q_step, dim, keys + kVectorBytes * g, s + W * g);
      VI top[R];
      softmax<true>(w, r, W * g0, W * g1, t.start, softcap, top);
      for (int i = 0; i < R; i++)
        step[i] = fix_weights(s + i * kTile, top[i], w.v_zero, W * g0, W * g1,
                              weights + i * kGroups * 2 * kVectorBytes, w.shift + r + i);
      fixed_weigh<R>(weights, step, values, g0, g1, w.o + r * dim, dim, w.keep + r, w.shift + r);
    });
  }
}

}  // namespace
}  // namespace qk::QK_ISA

#endif
