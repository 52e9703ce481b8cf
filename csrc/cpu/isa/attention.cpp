// Attention over pages of a KV cache, or over dense keys: softmax(q k^T) v, one pass over the keys
// (online softmax).
//
// A row is one query of one head; the rows of a sequence that share a KV head are numbered query *
// group + head within the group, and are worked on in blocks of kRows against tiles of at most
// kTile keys:
//
//   for each block of rows, for each tile of keys
//     scores  S [rows, tile] = Q K^T       3 rows x 4 keys in registers, vectors along the head
//     dimension softmax P = exp(S - max), rescaling what came before weigh   O [rows, D] += P V 3
//     rows x 4 vectors in registers
//
// Integer pages are never dequantized: with k = ks (kq - kz), q.k = ks (q.kq - kz sum(q)); vs is
// folded into P, and vz into one number per row. Codes are converted as they are loaded when few
// rows share a tile, and once per tile into float32 when many do; both give the same bits.
//
// A sequence that has a single block of rows (decoding) is split along its keys into chunks whose
// length depends on that sequence alone; their results are merged in order. So the bits of a
// sequence depend neither on the team nor on the rest of the batch.
#include "kv_rows.h"

namespace qk::QK_ISA {
namespace {

constexpr int kRows = 48;  // a multiple of 3; K and V tiles are read once per block
constexpr int kTile = 64;  // a tile of K at D = 64 is 16 KB of float32: half of a first-level cache
constexpr int kChunk = 128;     // keys of the shortest chunk of a split sequence
constexpr int kMaxChunks = 64;  // longer contexts get longer chunks, so that merging stays cheap
constexpr float kInf = __builtin_inff();

QK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
QK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
QK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Both ops, as one problem. Exactly one of `paged` and `dense` is set.
struct Problem {
  const void* q;  // [T, Hq, D]
  void* out;      // [T, Hq, D]
  Dtype type;
  int64_t q_stride, q_heads, kv_heads, dim, batch;
  const int32_t* query_start;  // [B + 1]
  float scale, softcap;
  bool causal;
  int64_t window;
  KvType kv_type;
  const AttentionArgs* paged;
  const DenseAttentionArgs* dense;
};

Problem problem(const AttentionArgs& a) {
  return {a.q,         a.out,         a.type,
          a.q_stride,  a.q_heads,     a.pages.kv_heads,
          a.pages.dim, a.batch.batch, a.batch.query_start,
          a.scale,     a.softcap,     a.causal,
          a.window,    a.pages.type,  &a,
          nullptr};
}
Problem problem(const DenseAttentionArgs& a) {
  const KvType kv = a.type == Dtype::f32   ? KvType::f32
                    : a.type == Dtype::f16 ? KvType::f16
                                           : KvType::bf16;
  return {a.q,           a.out,   a.type,    a.q_stride, a.q_heads, a.kv_heads, a.dim,   a.batch,
          a.query_start, a.scale, a.softcap, a.causal,   a.window,  kv,         nullptr, &a};
}

// How one sequence is cut into items: kv_heads * blocks * chunks of them, one of blocks and chunks
// being 1.
struct Sequence {
  int64_t token, queries,
      keys;              // first token; queries are the last ones of keys (when causal or windowed)
  int64_t rows, blocks;  // per KV head
  int64_t first_key, chunk, chunks;
  int64_t items, partial;  // partial: floats that hold the results of chunks
};

// Keys that a query sees: [begin, end), possibly empty.
QK_INLINE Range visible(const Problem& p, const Sequence& s, int64_t query) {
  const int64_t position = s.keys - s.queries + query;
  return {p.window > 0 ? max64(0, position - p.window + 1) : 0,
          p.causal ? min64(s.keys, position + 1) : s.keys};
}

// Floats of the result of one row over one chunk: O [D], then the maximum and the sum, padded to a
// cache line.
QK_INLINE int64_t partial_row(const Problem& p) { return p.dim + 16; }

Sequence sequence(const Problem& p, int64_t b) {
  Sequence s{};
  s.token = p.query_start[b];
  s.queries = p.query_start[b + 1] - s.token;
  s.keys = p.paged ? p.paged->batch.kv_len[b] : p.dense->kv_start[b + 1] - p.dense->kv_start[b];
  s.rows = s.queries * (p.q_heads / p.kv_heads);
  s.blocks = ceil_div(s.rows, kRows);
  s.first_key = max64(0, visible(p, s, 0).begin) / kChunk * kChunk;
  const int64_t span = max64(0, s.keys - s.first_key);
  s.chunk = max64(span, 1), s.chunks = 1;
  if (s.blocks == 1 && span > kChunk) {
    s.chunk = kChunk;
    while (s.chunk * kMaxChunks < span) s.chunk *= 2;
    s.chunks = ceil_div(span, s.chunk);
  }
  s.items = p.kv_heads * s.blocks * s.chunks;
  s.partial = s.chunks > 1 ? p.kv_heads * s.chunks * s.rows * partial_row(p) : 0;
  return s;
}

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
template <class Row>
QK_INLINE void fetch_row(const char* rows, int64_t row, int64_t stride, int64_t dim) {
  if (rows == nullptr) return;
  for (int64_t i = 0; i < Row::bytes(dim); i += 64)
    __builtin_prefetch(rows + row * stride + i, 0, 2);
}

// The tile that holds `key`: tiles end at multiples of kTile within a page, and at the page's end.
template <class Row>
QK_INLINE Tile tile_at(const Problem& p, int64_t b, int64_t head, int64_t key) {
  Tile t{};
  if (p.paged) {
    const KvPages& pages = p.paged->pages;
    const int64_t index = key / pages.page, within = key % pages.page / kTile * kTile;
    const int64_t page = p.paged->batch.page_table[b * p.paged->batch.table_stride + index];
    const int64_t page_bytes = pages.page_stride * (Row::integer ? 1 : Row::bytes(1));
    const int64_t row = Row::bytes(pages.dim),
                  at = page * page_bytes + (head * pages.page + within) * row;
    t.start = index * pages.page + within;
    t.count = min64(kTile, pages.page - within);
    t.k = static_cast<const char*>(pages.k) + at;
    t.v = static_cast<const char*>(pages.v) + at;
    t.k_stride = t.v_stride = row;
    if (Row::integer) {
      const int64_t scale = page * pages.scale_page_stride + head * 2 * pages.page + within;
      t.k_scale = pages.k_scale + scale;
      t.v_scale = pages.v_scale + scale;
    }
  } else {
    const DenseAttentionArgs& d = *p.dense;
    const int64_t element = Row::bytes(1);
    t.start = key / kTile * kTile;
    t.count = kTile;
    t.k_stride = d.k_stride * element, t.v_stride = d.v_stride * element;
    t.k = static_cast<const char*>(d.k) + (d.kv_start[b] + t.start) * t.k_stride +
          head * d.dim * element;
    t.v = static_cast<const char*>(d.v) + (d.kv_start[b] + t.start) * t.v_stride +
          head * d.dim * element;
  }
  return t;
}

// What a thread works in; the arrays are in its part of the scratch.
struct Work {
  float* q;     // [kRows, D], times the scale
  float* o;     // [kRows, D]
  float* s;     // [kRows, kTile]: scores, then weights
  float* tile;  // [kTile, D]: K or V as float32
  float max[kRows], sum[kRows], q_sum[kRows];
  float keep[kRows], shift[kRows];   // O = O * keep - shift before a tile is added
  int64_t begin[kRows], end[kRows];  // keys that the row sees, absolute
  float k_scale[kTile], k_zero[kTile], v_scale[kTile], v_zero[kTile];
};
QK_INLINE int64_t work_floats(int64_t dim) { return kRows * dim * 2 + kRows * kTile + kTile * dim; }

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

// ---- softmax ----

// The row's scores of a tile (lanes [v0, v1), visible [a, b)) become weights; its maximum and sum
// are updated.
template <bool integer>
QK_INLINE void softmax(Work& w, int r, int64_t v0, int64_t v1, int64_t a, int64_t b,
                       float softcap) {
  float* s = w.s + r * kTile;
  if (integer)
    for (int64_t t = v0; t < v1; t += W)
      store(s + t, load(w.k_scale + t) * (load(s + t) - load(w.k_zero + t) * splat(w.q_sum[r])));
  if (softcap > 0.f)
    for (int64_t t = v0; t < v1; t += W) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const VF e = vexp(load(s + t) * splat(2.f / softcap));
      store(s + t, splat(softcap) - splat(2.f * softcap) / (e + splat(1.f)));
    }
  for (int64_t t = v0; t < min64(a, v1); t++) s[t] = -kInf;
  for (int64_t t = max64(b, v0); t < v1; t++) s[t] = -kInf;
  VF top = splat(-kInf);
  for (int64_t t = v0; t < v1; t += W) top = vmax(load(s + t), top);
  const float max = w.max[r], tile_max = reduce_max(top), new_max = tile_max > max ? tile_max : max;
  const float base = new_max == -kInf ? 0.f : new_max;  // nothing visible yet: exp(-inf - 0) = 0
  VF sum{}, shift{};
  for (int64_t t = v0; t < v1; t += W) {
    VF e = vexp(load(s + t) - splat(base));
    sum += e;
    if (integer) {
      e *= load(w.v_scale + t);
      shift = fma(e, load(w.v_zero + t), shift);
    }
    store(s + t, e);
  }
  w.keep[r] = vexp(splat(max - base))[0];
  w.max[r] = new_max;
  w.sum[r] = w.sum[r] * w.keep[r] + reduce_add(sum);
  w.shift[r] = integer ? reduce_add(shift) : 0.f;
}

// ---- weigh ----

// o [R, 16 C] = o * keep - shift + p [R, keys] v [keys, 16 C] for the dims from 16 c on.
template <class Row, int R, int C>
QK_INLINE void weigh_dims(const float* p, const char* v, int64_t stride, int64_t begin, int64_t end,
                          int64_t c, float* o, int64_t dim, const float* keep, const float* shift,
                          const char* next) {
  constexpr int N = C * kVecs;
  VF acc[R][N];
#pragma GCC unroll 3
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
      acc[r][i] = load(o + r * dim + kDims * c + W * i) * splat(keep[r]) - splat(shift[r]);
  for (int64_t t = begin; t < end; t++) {
    if (c == 0) fetch_row<Row>(next, t, stride, dim);
    VF weight[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; r++) weight[r] = splat(p[r * kTile + t]);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
      const VF x = Row::load(v + t * stride, c + i / kVecs, i % kVecs);
#pragma GCC unroll 3
      for (int r = 0; r < R; r++) acc[r][i] = fma(weight[r], x, acc[r][i]);
    }
  }
#pragma GCC unroll 3
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
  constexpr int vectors =
      R == 1 ? 8 : 4;  // R * vectors accumulators: 8 hide the latency, 12 fit into 16 registers
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
template <class F>
QK_INLINE void with_count(int rows, F f) {
  if (rows == 3) f(Count<3>{});
  else if (rows == 2) f(Count<2>{});
  else f(Count<1>{});
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

template <class Row, class Stored>  // Row: what `k` and `v` point to; Stored: the type of the pages
void attend_tile(Work& w, int rows, int64_t dim, const Tile& t, float softcap) {
  const char *k = t.k, *v = t.v, *next_k = t.next_k, *next_v = t.next_v;
  int64_t k_stride = t.k_stride, v_stride = t.v_stride;
  if constexpr (!kSame<Row, Stored>) {
    next_k = next_v = nullptr;  // many rows keep a tile busy for long
    convert<Stored>(t.k, t.k_stride, t.count, dim, w.tile);
    k = reinterpret_cast<const char*>(w.tile);
    k_stride = dim * 4;
  }
  for (int r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r);
    const Range keys = seen(w, t, r, n);
    if (keys.begin >= keys.end) continue;
    with_count(n, [&](auto c) {
      scores<Row, decltype(c)::count>(w.q + r * dim, dim, k, k_stride, keys.begin, keys.end,
                                      w.s + r * kTile, next_k);
    });
    next_k = nullptr;
    const int64_t v0 = keys.begin / W * W, v1 = ceil_div(keys.end, W) * W;
    for (int i = r; i < r + n; i++)
      softmax<Stored::integer>(w, i, v0, v1, w.begin[i] - t.start, w.end[i] - t.start, softcap);
  }
  if constexpr (!kSame<Row, Stored>) {
    convert<Stored>(t.v, t.v_stride, t.count, dim, w.tile);
    v = reinterpret_cast<const char*>(w.tile);
    v_stride = dim * 4;
  }
  for (int r = 0, n; r < rows; r += n) {
    n = next_rows(rows - r);
    const Range keys = seen(w, t, r, n);
    if (keys.begin >= keys.end) continue;
    with_count(n, [&](auto c) {
      weigh<Row, decltype(c)::count>(w.s + r * kTile, v, v_stride, keys.begin, keys.end,
                                     w.o + r * dim, dim, w.keep + r, w.shift + r, next_v);
    });
    next_v = nullptr;
  }
}

// The scales of a tile's keys. Past the last key there may be anything, even NaN: it becomes 0.
QK_INLINE void widen_scales(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load_half(from + i));
  for (; i < count; i++) to[i] = half_to_float(from[i]);
  for (; i < kTile; i++) to[i] = 0.f;
}

// Rows row0 .. row0 + rows of a KV head over the keys in `span`: w.o, w.max and w.sum.
template <class Row>
void attend(const Problem& p, const Sequence& s, int64_t b, int64_t head, int64_t row0, int rows,
            Range span, Work& w) {
  const int64_t group = p.q_heads / p.kv_heads, dim = p.dim;
  int64_t first = s.keys, last = 0;
  with_type(p.type, [&](auto io) {
    using T = decltype(io);
    for (int r = 0; r < rows; r++) {
      const int64_t query = (row0 + r) / group, member = (row0 + r) % group;
      const auto* q = static_cast<const typename T::type*>(p.q) + (s.token + query) * p.q_stride +
                      (head * group + member) * dim;
      VF sum{};
      for (int64_t d = 0; d < dim; d += W) {
        const VF x = T::load(q + d) * splat(p.scale);
        store(w.q + r * dim + d, x);
        store(w.o + r * dim + d, VF{});
        sum += x;
      }
      w.q_sum[r] = reduce_add(sum);
      w.max[r] = -kInf, w.sum[r] = 0.f;
      const Range keys = visible(p, s, query);
      w.begin[r] = max64(keys.begin, span.begin), w.end[r] = min64(keys.end, span.end);
      if (w.begin[r] >= w.end[r]) continue;
      first = min64(first, w.begin[r]);
      last = max64(last, w.end[r]);
    }
  });
  if (first >= last) return;
  Tile next = tile_at<Row>(p, b, head, first);
  for (int64_t key = first; key < last;) {
    Tile t = next;
    key = t.start + t.count;
    if (key < last) {
      next = tile_at<Row>(p, b, head, key);
      t.next_k = next.k, t.next_v = next.v;
    }
    t.count = min64(t.count, last - t.start);
    if (Row::integer) {
      const int64_t page = p.paged->pages.page;
      widen_scales(t.k_scale, t.count, w.k_scale);
      widen_scales(t.k_scale + page, t.count, w.k_zero);
      widen_scales(t.v_scale, t.count, w.v_scale);
      widen_scales(t.v_scale + page, t.count, w.v_zero);
    }
    const bool few_rows =
        rows <= 6;  // two passes over a tile: converting twice is cheaper than storing float32
    if (Row::is_float32 || few_rows) attend_tile<Row, Row>(w, rows, dim, t, p.softcap);
    else attend_tile<FloatRow<Dtype::f32>, Row>(w, rows, dim, t, p.softcap);
  }
}

// out = o / sum for one row; a row that saw no key gives zeros.
template <class T>
QK_INLINE void finish(const Problem& p, const Sequence& s, int64_t head, int64_t row,
                      const float* o, float sum) {
  const int64_t group = p.q_heads / p.kv_heads, query = row / group, member = row % group;
  auto* out = static_cast<typename T::type*>(p.out) +
              ((s.token + query) * p.q_heads + head * group + member) * p.dim;
  const VF inverse = splat(sum == 0.f ? 0.f : 1.f / sum);
  for (int64_t d = 0; d < p.dim; d += W) T::store(out + d, load(o + d) * inverse);
}

// Item `index` of a sequence. The last rows come first: they see most keys, and short items at the
// end even out.
void attend_item(const Problem& p, const Sequence& s, int64_t b, int64_t index, float* partial,
                 Work& w) {
  const int64_t head = index % p.kv_heads, part = index / p.kv_heads;
  const int64_t block = s.blocks - 1 - part / s.chunks, chunk = part % s.chunks;
  const int64_t row0 = block * kRows;
  const int rows = int(min64(kRows, s.rows - row0));
  const int64_t begin = s.first_key + chunk * s.chunk;
  const Range span = s.chunks > 1 ? Range{begin, min64(begin + s.chunk, s.keys)} : Range{0, s.keys};
  with_rows(p.kv_type,
            [&](auto row) { attend<decltype(row)>(p, s, b, head, row0, rows, span, w); });
  if (s.chunks == 1) {
    with_type(p.type, [&](auto io) {
      for (int r = 0; r < rows; r++)
        finish<decltype(io)>(p, s, head, row0 + r, w.o + r * p.dim, w.sum[r]);
    });
    return;
  }
  for (int r = 0; r < rows; r++) {
    float* to = partial + ((head * s.rows + r) * s.chunks + chunk) * partial_row(p);
    std::memcpy(to, w.o + r * p.dim, size_t(p.dim) * 4);
    to[p.dim] = w.max[r], to[p.dim + 1] = w.sum[r];
  }
}

// Row `row` of a KV head from its chunks, in order.
void merge(const Problem& p, const Sequence& s, int64_t head, int64_t row, const float* partial,
           Work& w) {
  const float* from = partial + (head * s.rows + row) * s.chunks * partial_row(p);
  float max = -kInf, sum = 0.f;
  for (int64_t c = 0; c < s.chunks; c++)
    max = from[c * partial_row(p) + p.dim] > max ? from[c * partial_row(p) + p.dim] : max;
  const float base = max == -kInf ? 0.f : max;
  for (int64_t d = 0; d < p.dim; d += W) store(w.o + d, VF{});
  for (int64_t c = 0; c < s.chunks; c++) {
    const float* chunk = from + c * partial_row(p);
    const VF weight = vexp(splat(chunk[p.dim] - base));
    sum += weight[0] * chunk[p.dim + 1];
    for (int64_t d = 0; d < p.dim; d += W)
      store(w.o + d, fma(weight, load(chunk + d), load(w.o + d)));
  }
  with_type(p.type, [&](auto io) { finish<decltype(io)>(p, s, head, row, w.o, sum); });
}

// Scratch: the work arrays of every thread, then the results of chunks in the order of the
// sequences.
int64_t scratch_bytes(const Problem& p, int team) {
  int64_t floats = team * work_floats(p.dim);
  for (int64_t b = 0; b < p.batch; b++) floats += sequence(p, b).partial;
  return floats * 4 + 64;
}

void attend_batch(const Problem& p, void* scratch, Team& team) {
  float* base = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  float* partials = base + team.size * work_floats(p.dim);
  Work w;
  w.q = base + team.rank * work_floats(p.dim);
  w.o = w.q + kRows * p.dim;
  w.s = w.o + kRows * p.dim;
  w.tile = w.s + kRows * kTile;

  // Items are handed out in order, so each thread walks over the sequences once.
  int64_t claimed = 0, first_item = 0, first_partial = 0;
  bool any_split = false;
  const auto claim = [&] {
    return team.size == 1 ? claimed++ : team.barrier->next.fetch_add(1, std::memory_order_relaxed);
  };
  int64_t item = claim();
  for (int64_t b = 0; b < p.batch; b++) {
    const Sequence s = sequence(p, b);
    any_split |= s.chunks > 1;
    for (; item < first_item + s.items; item = claim())
      attend_item(p, s, b, item - first_item, partials + first_partial, w);
    first_item += s.items;
    first_partial += s.partial;
  }
  if (!any_split) return;
  team.sync();
  int64_t row = 0, total = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    const Sequence s = sequence(p, b);
    if (s.chunks > 1) total += s.rows * p.kv_heads;
  }
  const Range mine = team.share(total);
  first_partial = 0;
  for (int64_t b = 0; b < p.batch && row < mine.end; b++) {
    const Sequence s = sequence(p, b);
    if (s.chunks > 1) {
      const int64_t count = s.rows * p.kv_heads;
      for (int64_t i = max64(mine.begin - row, 0); i < min64(mine.end - row, count); i++)
        merge(p, s, i / s.rows, i % s.rows, partials + first_partial, w);
      row += count;
    }
    first_partial += s.partial;
  }
}

}  // namespace

int64_t attention_scratch(const AttentionArgs& a, int team) {
  return scratch_bytes(problem(a), team);
}
void attention(const AttentionArgs& a, void* scratch, Team& team) {
  attend_batch(problem(a), scratch, team);
}

int64_t attention_dense_scratch(const DenseAttentionArgs& a, int team) {
  return scratch_bytes(problem(a), team);
}
void attention_dense(const DenseAttentionArgs& a, void* scratch, Team& team) {
  attend_batch(problem(a), scratch, team);
}

}  // namespace qk::QK_ISA
