// Attention over pages of a KV cache, or over dense keys: softmax(q k^T) v, one pass over the keys
// (online softmax).
//
// A row is one query of one head; the rows of a sequence that share a KV head are numbered query *
// group + head within the group, and are worked on in blocks of kRows against tiles of at most
// kTile keys:
//
//   for each block of rows, for each tile of keys
//     scores   S [rows, tile] = Q K^T
//     softmax  P = exp(S - max), rescaling what came before
//     weigh    O [rows, D] += P V
//
// attention_tile.h has these for few rows (decoding), where keys are used as they lie, and for
// many, where the tile is first brought into an order that suits. A query's bits may differ between
// the two in the last place.
//
// Integer pages are never dequantized: with k = ks (kq - kz), q.k = ks (q.kq - kz sum(q)); vs is
// folded into P, and vz into one number per row. On AVX-512 both products are integers
// (attention_fixed.h).
//
// Sinks are no keys: a row's softmax starts as if it had already seen one of that score, without a
// value.
//
// A sequence that has a single block of rows (decoding) is split along its keys into chunks whose
// length depends on that sequence alone; their results are merged in order. So the bits of a
// sequence depend neither on the team nor on the rest of the batch.
#include "attention_fixed.h"

namespace qk::QK_ISA {
namespace {

constexpr int kChunk = 256;     // keys of the shortest chunk of a split sequence
constexpr int kFewRows = 6;     // of a block
constexpr int kMaxChunks = 64;  // longer contexts get longer chunks, so that merging stays cheap

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
  ScoreBias bias;
  const AttentionArgs* paged;
  const DenseAttentionArgs* dense;
};

Problem problem(const AttentionArgs& a) {
  return {a.q,         a.out,         a.type,
          a.q_stride,  a.q_heads,     a.pages.kv_heads,
          a.pages.dim, a.batch.batch, a.batch.query_start,
          a.scale,     a.softcap,     a.causal,
          a.window,    a.pages.type,  a.bias,
          &a,          nullptr};
}
Problem problem(const DenseAttentionArgs& a) {
  const KvType kv = a.type == Dtype::f32   ? KvType::f32
                    : a.type == Dtype::f16 ? KvType::f16
                                           : KvType::bf16;
  return {a.q,      a.out,   a.type,        a.q_stride, a.q_heads, a.kv_heads,
          a.dim,    a.batch, a.query_start, a.scale,    a.softcap, a.causal,
          a.window, kv,      a.bias,        nullptr,    &a};
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

// Where a piece of work begins: sequence, head and key; sequence -1: nowhere.
struct Place {
  int64_t b, head, key;
};

template <class Row>
void attend_any_tile(Work& w, int rows, int64_t dim, const Tile& t, float softcap) {
#if defined(QK_ISA_AVX512)
  if constexpr (Row::integer) {
    attend_fixed_tile<Row>(w, rows, dim, t, softcap);
  } else
#endif
  {
    if (rows <= kFewRows) attend_tile<Row>(w, rows, dim, t, softcap);
    else attend_many<Row>(w, rows, dim, t, softcap);
  }
}

QK_INLINE RowBias row_bias(const Problem& p, const Sequence& s, int64_t head, int64_t query) {
  const ScoreBias& b = p.bias;
  return {s.keys - s.queries + query, b.alibi_slopes ? b.alibi_slopes[head] : 0.f,
          b.distance_bias ? b.distance_bias + head * (2 * b.reach + 1) + b.reach : nullptr};
}

// Rows row0 .. row0 + rows of a KV head over the keys in `span`: w.o, w.max and w.sum. `following`:
// what this thread will probably work on next.
template <class Row>
void attend(const Problem& p, const Sequence& s, int64_t b, int64_t head, int64_t row0, int rows,
            Range span, Place following, Work& w) {
  const int64_t group = p.q_heads / p.kv_heads, dim = p.dim;
  // Of the chunks of a sequence one has the sink.
  const float* sinks = span.begin <= s.first_key ? p.bias.sinks : nullptr;
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
#if defined(QK_ISA_AVX512)
      if constexpr (Row::integer) fix_query(w, r, dim);
#endif
      const int64_t q_head = head * group + member;
      w.max[r] = sinks ? sinks[q_head] : -kInf, w.sum[r] = sinks ? 1.f : 0.f;
      if (w.biased) w.bias[r] = row_bias(p, s, q_head, query);
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
    if (key < last || following.b >= 0) {
      next = key < last ? tile_at<Row>(p, b, head, key)
                        : tile_at<Row>(p, following.b, following.head, following.key);
      t.next_k = next.k, t.next_v = next.v;
      if (Row::integer) fetch_scales(next, p.paged->pages.page);
    }
    t.count = min64(t.count, last - t.start);
    if (Row::integer) {
      const int64_t page = p.paged->pages.page;
      widen_scales(t.k_scale, t.count, w.k_scale);
      widen_scales(t.k_scale + page, t.count, w.k_zero);
      widen_scales(t.v_scale, t.count, w.v_scale);
      widen_scales(t.v_scale + page, t.count, w.v_zero);
    }
    attend_any_tile<Row>(w, rows, dim, t, p.softcap);
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

// Where item `index` of sequence b begins, if that sequence is a single block of rows: tiles are
// fetched ahead for decoding.
QK_INLINE Place place(const Problem& p, const Sequence& s, int64_t b, int64_t index) {
  if (s.blocks != 1 || index >= s.items || s.first_key >= s.keys) return {-1, 0, 0};
  return {b, index % p.kv_heads, s.first_key + index / p.kv_heads * s.chunk};
}

// Item `index` of a sequence. The last rows come first: they see most keys, and short items at the
// end even out.
void attend_item(const Problem& p, const Sequence& s, int64_t b, int64_t index, Place following,
                 float* partial, Work& w) {
  const int64_t head = index % p.kv_heads, part = index / p.kv_heads;
  const int64_t block = s.blocks - 1 - part / s.chunks, chunk = part % s.chunks;
  const int64_t row0 = block * kRows;
  const int rows = int(min64(kRows, s.rows - row0));
  const int64_t begin = s.first_key + chunk * s.chunk;
  const Range span = s.chunks > 1 ? Range{begin, min64(begin + s.chunk, s.keys)} : Range{0, s.keys};
  with_rows(p.kv_type, [&](auto row) {
    attend<decltype(row)>(p, s, b, head, row0, rows, span, following, w);
  });
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
  w.fixed = reinterpret_cast<int8_t*>(w.tile + tile_floats(p.dim));
  w.biased = p.bias.alibi_slopes || p.bias.distance_bias;
  w.reach = p.bias.reach;

  // Items are handed out in order, so each thread walks over the sequences once.
  int64_t claimed = 0, first_item = 0, first_partial = 0;
  bool any_split = false;
  const auto claim = [&] {
    return team.size == 1 ? claimed++ : team.barrier->next.fetch_add(1, std::memory_order_relaxed);
  };
  int64_t item = claim();
  Sequence s{}, after{};
  if (p.batch > 0) s = sequence(p, 0);
  for (int64_t b = 0; b < p.batch; b++, s = after) {
    any_split |= s.chunks > 1;
    if (b + 1 < p.batch) after = sequence(p, b + 1);
    for (; item < first_item + s.items; item = claim()) {
      const int64_t index = item - first_item, next = index + team.size;
      Place following = place(p, s, b, next);
      if (next >= s.items && b + 1 < p.batch) following = place(p, after, b + 1, next - s.items);
      attend_item(p, s, b, index, following, partials + first_partial, w);
    }
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
