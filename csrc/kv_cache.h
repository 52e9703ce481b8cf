// Tensors of a paged KV cache and of a ragged batch -> args; shared by attention, kv_append and
// decoder_step, on every backend. All must be on the device of `like`, whose name is `first`.
#pragma once
#include "check.h"

namespace qk {

constexpr int64_t kMaxHeadDim = 512;

// A tensor whose trailing dimensions, from `first` on, lie densely; those before may have any
// stride.
inline void expect_dense_from(const char* op, const char* name, const Tensor& t, int64_t first) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= first; i--) {
    check(t.size(i) <= 1 || t.stride(i) == stride, op, name, " must be dense in its last ",
          t.dim() - first, " dimensions; call .contiguous() on it");
    stride *= t.size(i);
  }
}

// [T, H, D] with tokens a constant stride apart. Returns that stride in elements.
inline int64_t token_stride(const char* op, const char* name, const Tensor& t, const char* first,
                            const Tensor& like) {
  check(t.dim() == 3, op, name, " must be [tokens, heads, head dim], got ", shape_of(t));
  same_device(op, name, t, first, like);
  expect_dense_from(op, name, t, 1);
  return t.stride(0);
}

inline int64_t head_dim(const char* op, const Tensor& q) {
  check(q.dim() == 3, op, "q must be [tokens, heads, head dim], got ", shape_of(q));
  const int64_t dim = q.size(2);
  check(dim > 0 && dim % 16 == 0 && dim <= kMaxHeadDim, op,
        "the head dim must be a multiple of 16 up to ", kMaxHeadDim, ", got ", dim);
  return dim;
}

inline void check_heads(const char* op, int64_t q_heads, int64_t kv_heads) {
  check(kv_heads > 0 && q_heads > 0 && q_heads % kv_heads == 0, op, "the heads of q (", q_heads,
        ") must be a multiple of the KV heads (", kv_heads, ")");
}

// k and v [count, kv_heads, D] of q's type.
inline void expect_keys(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                        int64_t count, int64_t kv_heads) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check(t.scalar_type() == q.scalar_type(), op, name, " must be ", type_name(q.scalar_type()),
          " like q, got ", type_name(t.scalar_type()));
    check(t.size(0) == count && t.size(1) == kv_heads && t.size(2) == q.size(2), op, name,
          " must be [", count, ", ", kv_heads, ", ", q.size(2), "], got ", shape_of(t));
  }
}

inline KvPages make_pages(const char* op, int64_t dim, const Tensor& k, const Tensor& v,
                          const std::optional<Tensor>& k_scale,
                          const std::optional<Tensor>& v_scale, const char* first,
                          const Tensor& like) {
  KvPages p{};
  check(k.dim() == 4, op, "k_pages must be [pages, KV heads, page size, head dim], got ",
        shape_of(k));
  const ScalarType type = k.scalar_type();
  p.pages = k.size(0), p.kv_heads = k.size(1), p.page = k.size(2), p.dim = dim;
  check(p.page > 0 && p.page % 16 == 0, op, "the page size must be a multiple of 16, got ", p.page);
  const int64_t stored = k.size(3);
  switch (type) {
    case ScalarType::Float: p.type = KvType::f32; break;
    case ScalarType::Half: p.type = KvType::f16; break;
    case ScalarType::BFloat16: p.type = KvType::bf16; break;
    case ScalarType::Byte: p.type = stored == dim ? KvType::int8 : KvType::int4; break;
    default: fail(op, "k_pages must be float32, float16, bfloat16 or uint8, got ", type_name(type));
  }
  check(stored == (p.type == KvType::int4 ? dim / 2 : dim), op, "k_pages must have ", dim,
        " in the last dimension", type == ScalarType::Byte ? " (int8) or half of it (int4)" : "",
        ", got ", shape_of(k));
  check(v.scalar_type() == type, op, "v_pages must be ", type_name(type), ", got ",
        type_name(v.scalar_type()));
  check(v.dim() == 4 && v.size(0) == p.pages && v.size(1) == p.kv_heads && v.size(2) == p.page &&
            v.size(3) == stored,
        op, "v_pages must be ", shape_of(k), ", got ", shape_of(v));
  same_device(op, "k_pages", k, first, like);
  same_device(op, "v_pages", v, first, like);
  expect_dense_from(op, "k_pages", k, 1);
  expect_dense_from(op, "v_pages", v, 1);
  check(p.pages <= 1 || k.stride(0) == v.stride(0), op,
        "k_pages and v_pages must have the same stride between pages");
  p.page_stride = k.stride(0);
  p.k = k.data_ptr(), p.v = v.data_ptr();
  if (type != ScalarType::Byte) {
    check(!k_scale && !v_scale, op, "k_scale and v_scale belong to uint8 pages, and these are ",
          type_name(type));
    return p;
  }
  check(k_scale && v_scale, op, "uint8 pages need k_scale and v_scale");
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"k_scale", *k_scale}, {"v_scale", *v_scale}}) {
    check(t.scalar_type() == ScalarType::Half, op, name, " must be float16, got ",
          type_name(t.scalar_type()));
    check(t.dim() == 4 && t.size(0) == p.pages && t.size(1) == p.kv_heads && t.size(2) == 2 &&
              t.size(3) == p.page,
          op, name, " must be [", p.pages, ", ", p.kv_heads, ", 2, ", p.page, "], got ",
          shape_of(t));
    same_device(op, name, t, first, like);
    expect_dense_from(op, name, t, 1);
  }
  check(p.pages <= 1 || k_scale->stride(0) == v_scale->stride(0), op,
        "k_scale and v_scale must have the same stride between pages");
  p.scale_page_stride = k_scale->stride(0);
  p.k_scale = static_cast<uint16_t*>(k_scale->data_ptr()),
  p.v_scale = static_cast<uint16_t*>(v_scale->data_ptr());
  return p;
}

// [B + 1] int32. Returns B.
inline int64_t sequences(const char* op, const char* name, const Tensor& t, const char* first,
                         const Tensor& like) {
  check(t.dim() == 1 && t.size(0) >= 1, op, name, " must be [sequences + 1], got ", shape_of(t));
  expect(op, name, t, ScalarType::Int, {-1});
  same_device(op, name, t, first, like);
  return t.size(0) - 1;
}

// From 0 to `total`, never falling.
inline void check_starts(const char* op, const char* name, const int32_t* start, int64_t batch,
                         int64_t total) {
  check(start[0] == 0 && start[batch] == total, op, name, " must run from 0 to ", total, ", got ",
        start[0], " to ", start[batch]);
  for (int64_t b = 0; b < batch; b++)
    check(start[b] <= start[b + 1], op, name, " must not fall: ", name, "[", b, "] = ", start[b],
          ", ", name, "[", b + 1, "] = ", start[b + 1]);
}

inline void check_ragged(const char* op, const Ragged& r, const KvPages& pages) {
  check_starts(op, "query_start", r.query_start, r.batch, r.tokens);
  for (int64_t b = 0; b < r.batch; b++) {
    const int64_t count = r.query_start[b + 1] - r.query_start[b], length = r.kv_len[b];
    check(length >= count, op, "kv_len[", b, "] must count the ", count, " new tokens too, got ",
          length);
    const int64_t used = (length + pages.page - 1) / pages.page;
    check(used <= r.table_stride, op, "page_table has ", r.table_stride,
          " pages per sequence, but kv_len[", b, "] = ", length, " needs ", used, " pages of ",
          pages.page);
    for (int64_t i = 0; i < used; i++) {
      const int32_t page = r.page_table[b * r.table_stride + i];
      check(page >= 0 && page < pages.pages, op, "page_table[", b, ", ", i,
            "] must be a page in [0, ", pages.pages, "), got ", page);
    }
  }
}

inline Ragged make_ragged(const char* op, int64_t tokens, const KvPages& pages,
                          const Tensor& query_start, const Tensor& kv_len, const Tensor& page_table,
                          const char* first, const Tensor& like, Contents contents) {
  Ragged r{};
  r.batch = sequences(op, "query_start", query_start, first, like);
  r.tokens = tokens;
  expect(op, "kv_len", kv_len, ScalarType::Int, {r.batch});
  expect(op, "page_table", page_table, ScalarType::Int, {r.batch, -1});
  same_device(op, "kv_len", kv_len, first, like);
  same_device(op, "page_table", page_table, first, like);
  r.query_start = data<int32_t>(query_start);
  r.kv_len = data<int32_t>(kv_len);
  r.page_table = data<int32_t>(page_table);
  r.table_stride = page_table.size(1);
  if (contents == Contents::checked) check_ragged(op, r, pages);
  return r;
}

}  // namespace qk
