// A block of rows against one tile of keys: scores, softmax, and the weighted sum of values.
#pragma once
#include "kv_rows.h"
#include "score_bias.h"

namespace qk::QK_ISA {
namespace {

constexpr int kRows = 48;  // a multiple of 3; K and V tiles are read once per block
constexpr int kTile = 64;  // a tile of K at D = 64 is 16 KB of float32: half of a first-level cache
constexpr float kInf = __builtin_inff();

constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

QK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
QK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
QK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A stretch of keys of one head that lie at constant strides.
struct Tile {
  int64_t start, count;        // keys start .. start + count of the sequence
  const char *k, *v;           // row of key `start`
  int64_t k_stride, v_stride;  // bytes between keys
  const uint16_t *k_scale,
      *v_scale;                 // scale plane at key `start`, the zero points `page` further on
  const char *next_k, *next_v;  // the tile after this one, or null; its strides are the same
};

// Asks for one row of the next tile. Tiles lie apart, so that the processor does not foresee them.
// Into L1 where both tiles of K and V fit it: a core has more of such requests on their way.
template <class Row>
QK_INLINE void fetch_row(const char* rows, int64_t row, int64_t stride, int64_t dim) {
  if (rows == nullptr) return;
  const char* from = rows + row * stride;
  const int64_t bytes = Row::bytes(dim);
  if (bytes <= 128) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 3);
  } else {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}
// The same for the scales and zero points of a tile.
QK_INLINE void fetch_scales(const Tile& t, int64_t page) {
  const uint16_t* const planes[] = {t.k_scale, t.k_scale + page, t.v_scale, t.v_scale + page};
  for (const uint16_t* plane : planes)
    for (int64_t i = 0; i < t.count; i += 32) __builtin_prefetch(plane + i, 0, 3);
}

// What a thread works in; the arrays are in its part of the scratch.
struct Work {
  float* q;     // [kRows, D], times the scale
  float* o;     // [kRows, D]
  float* s;     // [kRows, kTile]: scores, then weights
  float* tile;  // [kTile, D]: K or V as float32, or both in the order of attention_fixed.h
  float max[kRows], sum[kRows], q_sum[kRows];
  int8_t* fixed;                     // queries of attention_fixed.h, [kRows, D / 64, 2, 4, 64]
  float q_step[kRows];               // their steps
  float keep[kRows], shift[kRows];   // O = O * keep - shift before a tile is added
  int64_t begin[kRows], end[kRows];  // keys that the row sees, absolute
  float k_scale[kTile], k_zero[kTile], v_scale[kTile], v_zero[kTile];
  bool biased;          // whether scores take the biases of their rows
  RowBias bias[kRows];  // set where biased
  int64_t reach;
};
// Floats of q, o and s; of the tile, which attention_fixed.h takes as 2 * 64 bytes of every 64
// dims; of its queries.
QK_INLINE int64_t tile_floats(int64_t dim) { return kTile * max64(dim, 32); }
QK_INLINE int64_t work_floats(int64_t dim) {
  const int64_t fixed = W == 16 ? kRows * ceil_div(dim, 64) * 128 : 0;
  return kRows * dim * 2 + kRows * kTile + tile_floats(dim) + fixed;
}

// ---- scores ----

// [sum(a), sum(b), sum(c), sum(d)]
QK_INLINE F4 sums4(VF a, VF b, VF c, VF d) {
#if defined(QK_ISA_AVX512)
  const VI even = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30}, odd = even + 1;
#elif defined(QK_ISA_AVX2)
  const VI even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = even + 1;
#else
  const VI even = {0, 2, 4, 6}, odd = even + 1;
#endif
  const VF ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  const VF cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
  const VF abcd = __builtin_shuffle(ab, cd, even) +
                  __builtin_shuffle(ab, cd, odd);  // in every lane of 128 bits
  F4 lane[W / 4];
  std::memcpy(lane, &abcd, sizeof abcd);
  for (int n = W / 8; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lane[i] += lane[i + n];
  return lane[0];
}

// s [R, 4 U] = q [R, D] . keys [4 U, D], key i at k + min(key + i, last) * stride.
template <class Row, int R, int U>
QK_INLINE void dots(const float* q, int64_t dim, const char* k, int64_t stride, int64_t key,
                    int64_t last, float* s) {
  const char* row[4 * U];
  for (int t = 0; t < 4 * U; t++) row[t] = k + min64(key + t, last) * stride;
  VF acc[R][4 * U] = {};
  for (int64_t c = 0; c < dim / kDims; c++) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; j++) {
      VF query[R];
#pragma GCC unroll 3
      for (int r = 0; r < R; r++) query[r] = load(q + r * dim + kDims * c + W * j);
#pragma GCC unroll 8
      for (int t = 0; t < 4 * U; t++) {
        const VF x = Row::load(row[t], c, j);
#pragma GCC unroll 3
        for (int r = 0; r < R; r++) acc[r][t] = fma(query[r], x, acc[r][t]);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int u = 0; u < U; u++) {
      const F4 sum = sums4(acc[r][4 * u], acc[r][4 * u + 1], acc[r][4 * u + 2], acc[r][4 * u + 3]);
      std::memcpy(s + r * kTile + key + 4 * u, &sum, sizeof sum);
    }
}

template <class Row, int R>
void scores(const float* q, int64_t dim, const char* k, int64_t stride, int64_t begin, int64_t end,
            float* s, const char* next) {
  constexpr int U =
      R == 1 ? 2 : 1;  // at least 8 accumulators: the latency of an FMA times two per cycle
  for (int64_t t = begin / (4 * U) * (4 * U); t < end; t += 4 * U) {
    for (int i = 0; i < 4 * U; i++) fetch_row<Row>(next, t + i, stride, dim);
    dots<Row, R, U>(q, dim, k, stride, t, end - 1, s);
  }
}

// ---- scores of many rows ----

// x[i][j] <-> x[j][i]
QK_INLINE void transpose(VF (&x)[W]) {
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    const VI lane = load_raw<VI>(kLanes), odd = (lane & step) != 0;
    const VI low = odd ? lane - step + W : lane, high = odd ? lane + W : lane + step;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      if (i & step) continue;
      const VF a = x[i], b = x[i + step];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// Keys [count, D] -> [D, kTile] float32; beyond `count`, up to a multiple of W, the last one again.
template <class Row>
void order_keys(const char* k, int64_t stride, int64_t count, int64_t dim, float* out) {
  for (int64_t t = 0; t < count; t += W)
    for (int64_t c = 0; c < dim / kDims; c++)
      for (int j = 0; j < kVecs; j++) {
        VF x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = Row::load(k + min64(t + i, count - 1) * stride, c, j);
        transpose(x);
        float* to = out + (kDims * c + W * j) * kTile + t;
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(to + i * kTile, x[i]);
      }
}

// Rows times 4 vectors of keys are sums in registers: 24 of 32, or 12 of 16.
constexpr int kWide = W == 16 ? 6 : 3;

// s [R, keys] = q [R, D] . keys [D, kTile], whole groups of 4 W keys.
template <int R>
void wide_scores(const float* q, int64_t dim, const float* keys, Range range, float* s) {
  for (int64_t t = range.begin / (4 * W) * (4 * W); t < range.end; t += 4 * W) {
    VF acc[R][4] = {};
    const float* from = keys + t;
    for (int64_t d = 0; d < dim; d++, from += kTile) {
      VF x[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) x[v] = load(from + W * v);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const VF query = splat(q[r * dim + d]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) acc[r][v] = fma(query, x[v], acc[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) store(s + r * kTile + t + W * v, acc[r][v]);
  }
}
// ---- softmax ----

// Scores of rows r0 .. r0 + R - 1, as the products left them, become what the softmax takes; most:
// the largest of each lane.
template <bool integer, bool biased, int R>
QK_INLINE void finish_scores(const Work& w, int r0, int64_t v0, int64_t v1, int64_t start,
                             float softcap, bool masked, VF (&most)[R]) {
  float* s = w.s + r0 * kTile;
  for (int r = 0; r < R; r++) most[r] = splat(-kInf);
  for (int64_t t = v0; t < v1; t += W) {
    VF scale, zero;
    if (integer) scale = load(w.k_scale + t), zero = load(w.k_zero + t);
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) {
      VF x = load(s + r * kTile + t);
      if (integer) x = scale * (x - zero * splat(w.q_sum[r0 + r]));
      if (softcap > 0.f)  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        x = splat(softcap) - splat(2.f * softcap) / (vexp(x * splat(2.f / softcap)) + splat(1.f));
      if constexpr (biased)
        x = add_bias(x, w.bias[r0 + r], w.reach, start + t, load_raw<VI>(kLanes));
      if (masked) {
        const VI key = load_raw<VI>(kLanes) + int32_t(t);
        const VI first = splat_i(int32_t(max64(w.begin[r0 + r] - start, 0)));
        const VI end = splat_i(int32_t(min64(w.end[r0 + r] - start, kTile)));
        x = key >= first ? x : splat(-kInf);
        x = key < end ? x : splat(-kInf);
      }
      store(s + r * kTile + t, x);
      most[r] = vmax(x, most[r]);
    }
  }
}

// Scores of rows r0 .. r0 + R - 1 of a tile that starts at key `start` (lanes [v0, v1)) become
// weights; the rows' maxima and sums are updated. top: the largest magnitudes of weights, as bits.
// Rows go side by side: one alone waits for itself most of the time.
template <bool integer, int R>
QK_INLINE void softmax(Work& w, int r0, int64_t v0, int64_t v1, int64_t start, float softcap,
                       VI (&top)[R]) {
  float* s = w.s + r0 * kTile;
  constexpr bool shifted = integer && W != 16;  // else attention_fixed.h sets shift
  VF most[R], base[R], sum[R] = {}, shift[R] = {};
  bool masked = false;
  for (int r = 0; r < R; r++) {
    top[r] = VI{};
    masked |= w.begin[r0 + r] > start + v0 || w.end[r0 + r] < start + v1;
  }
  if (w.biased) finish_scores<integer, true>(w, r0, v0, v1, start, softcap, masked, most);
  else finish_scores<integer, false>(w, r0, v0, v1, start, softcap, masked, most);
#pragma GCC unroll 3
  for (int r = 0; r < R; r++) {
    const float old = w.max[r0 + r], tile = reduce_max(most[r]), max = tile > old ? tile : old;
    const float from = max == -kInf ? 0.f : max;  // nothing visible yet: exp(-inf - 0) = 0
    base[r] = splat(from);
    w.max[r0 + r] = max;
    w.keep[r0 + r] = vexp_negative(splat(old - from))[0];
  }
  for (int64_t t = v0; t < v1; t += W) {
    VF scale, zero;
    if (integer) scale = load(w.v_scale + t);
    if (shifted) zero = load(w.v_zero + t);
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) {
      const VF x = load(s + r * kTile + t);
      VF e = vexp_negative(x - base[r]);
      sum[r] += e;
      if (integer) {
        // Keys that the row does not see may have any scale, even NaN.
        const VF hidden = masked ? x : VF{};
        e = hidden == splat(-kInf) ? VF{} : e * scale;
        if (shifted) shift[r] = fma(e, hidden == splat(-kInf) ? VF{} : zero, shift[r]);
        const VI bits = (VI)vabs(e);
        top[r] = bits > top[r] ? bits : top[r];
      }
      store(s + r * kTile + t, e);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; r++) {
    w.sum[r0 + r] = w.sum[r0 + r] * w.keep[r0 + r] + reduce_add(sum[r]);
    w.shift[r0 + r] = shifted ? reduce_add(shift[r]) : 0.f;
  }
}

// ---- weigh ----

// o [R, 16 C] = o * keep - shift + p [R, keys] v [keys, 16 C] for the dims from 16 c on.
template <class Row, int R, int C>
QK_INLINE void weigh_dims(const float* p, const char* v, int64_t stride, int64_t begin, int64_t end,
                          int64_t c, float* o, int64_t dim, const float* keep, const float* shift,
                          const char* next) {
  constexpr int N = C * kVecs;
  VF acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
      acc[r][i] = load(o + r * dim + kDims * c + W * i) * splat(keep[r]) - splat(shift[r]);
  for (int64_t t = begin; t < end; t++) {
    if (c == 0) fetch_row<Row>(next, t, stride, dim);
    VF weight[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) weight[r] = splat(p[r * kTile + t]);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
      const VF x = Row::load(v + t * stride, c + i / kVecs, i % kVecs);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) acc[r][i] = fma(weight[r], x, acc[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(o + r * dim + kDims * c + W * i, acc[r][i]);
}

template <class Row, int R, int C>
QK_INLINE void weigh_from(int64_t c, const float* p, const char* v, int64_t stride, int64_t begin,
                          int64_t end, float* o, int64_t dim, const float* keep, const float* shift,
                          const char* next) {
  for (; c + C <= dim / kDims; c += C)
    weigh_dims<Row, R, C>(p, v, stride, begin, end, c, o, dim, keep, shift, next);
  if constexpr (C > 1)
    weigh_from<Row, R, C / 2>(c, p, v, stride, begin, end, o, dim, keep, shift, next);
}

template <class Row, int R>
void weigh(const float* p, const char* v, int64_t stride, int64_t begin, int64_t end, float* o,
           int64_t dim, const float* keep, const float* shift, const char* next) {
  // R * vectors accumulators: 8 hide the latency, 12 fit into 16 registers, 24 into 32.
  constexpr int vectors = R == 1 ? 8 : 4;
  weigh_from<Row, R, vectors / kVecs>(0, p, v, stride, begin, end, o, dim, keep, shift, next);
}

// ---- one item ----

// Rows are taken three at a time; four are two pairs, because a single row leaves the multipliers
// waiting.
QK_INLINE int next_rows(int left) { return left >= 3 && left != 4 ? 3 : left == 1 ? 1 : 2; }
template <int N>
struct Count {
  static constexpr int count = N;
};
template <int Most = 3, class F>
QK_INLINE void with_count(int rows, F f) {
  if constexpr (Most > 1)
    if (rows < Most) return with_count<Most - 1>(rows, f);
  f(Count<Most>{});
}

// rows [count, D] in storage order -> float32
template <class Row>
void convert(const char* rows, int64_t stride, int64_t count, int64_t dim, float* out) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t c = 0; c < dim / kDims; c++)
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; j++)
        store(out + t * dim + kDims * c + W * j, Row::load(rows + t * stride, c, j));
}

// The part of the tile that rows r .. r + count of the block see between them.
QK_INLINE Range seen(const Work& w, const Tile& t, int r, int count) {
  int64_t begin = kTile, end = 0;
  for (int i = r; i < r + count; i++) {
    const int64_t a = max64(w.begin[i] - t.start, 0), b = min64(w.end[i] - t.start, t.count);
    if (a >= b) continue;
    begin = min64(begin, a);
    end = max64(end, b);
  }
  return {begin, end};
}

// Rows that are weighed together need weights for the same keys.
template <bool integer>
void softmax_rows(Work& w, int r, int rows, Range keys, const Tile& t, float softcap) {
  with_count(rows, [&](auto c) {
    VI top[decltype(c)::count];
    softmax<integer>(w, r, keys.begin / W * W, ceil_div(keys.end, W) * W, t.start, softcap, top);
  });
}

template <class Row, int Most = 3>
void weigh_rows(Work& w, int r, int rows, const Tile& t, const char* v, int64_t stride, int64_t dim,
                const char* next) {
  const Range keys = seen(w, t, r, rows);
  if (keys.begin >= keys.end) return;
  with_count<Most>(rows, [&](auto c) {
    weigh<Row, decltype(c)::count>(w.s + r * kTile, v, stride, keys.begin, keys.end, w.o + r * dim,
                                   dim, w.keep + r, w.shift + r, next);
  });
}

// Few rows: codes and 16-bit floats are converted as they are loaded, once for K and once for V.
template <class Row>
void attend_tile(Work& w, int rows, int64_t dim, const Tile& t, float softcap) {
  const char *next_k = t.next_k, *next_v = t.next_v;
  for (int r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r);
    const Range keys = seen(w, t, r, n);
    if (keys.begin >= keys.end) continue;
    with_count(n, [&](auto c) {
      scores<Row, decltype(c)::count>(w.q + r * dim, dim, t.k, t.k_stride, keys.begin, keys.end,
                                      w.s + r * kTile, next_k);
    });
    next_k = nullptr;
    softmax_rows<Row::integer>(w, r, n, keys, t, softcap);
  }
  for (int r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r);
    weigh_rows<Row>(w, r, n, t, t.v, t.v_stride, dim, next_v);
    next_v = nullptr;
  }
}

// Many rows: the tile becomes float32, K with the keys in the lanes, so that scores need no sums
// across lanes.
template <class Row>
void attend_many(Work& w, int rows, int64_t dim, const Tile& t, float softcap) {
  order_keys<Row>(t.k, t.k_stride, t.count, dim, w.tile);
  for (int r = 0, n; r < rows; r += n) {
    n = rows - r < kWide ? rows - r : kWide;
    const Range keys = seen(w, t, r, n);
    if (keys.begin >= keys.end) continue;
    with_count<kWide>(n, [&](auto c) {
      wide_scores<decltype(c)::count>(w.q + r * dim, dim, w.tile, keys, w.s + r * kTile);
    });
    for (int i = r, few; i < r + n; i += few) {
      few = next_rows(r + n - i);
      softmax_rows<Row::integer>(w, i, few, keys, t, softcap);
    }
  }
  const char* v = t.v;
  int64_t v_stride = t.v_stride;
  if constexpr (!Row::is_float32) {
    convert<Row>(t.v, t.v_stride, t.count, dim, w.tile);
    v = reinterpret_cast<const char*>(w.tile);
    v_stride = dim * 4;
  }
  for (int r = 0, n; r < rows; r += n) {
    n = rows - r < kWide ? rows - r : kWide;
    weigh_rows<FloatRow<Dtype::f32>, kWide>(w, r, n, t, v, v_stride, dim, nullptr);
  }
}

// The scales of a tile's keys. Past the last key there may be anything, even NaN: it becomes 0.
QK_INLINE void widen_scales(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load_half(from + i));
  for (; i < count; i++) to[i] = half_to_float(from[i]);
  for (; i < kTile; i++) to[i] = 0.f;
}

}  // namespace
}  // namespace qk::QK_ISA
