// Checks of the paged KV cache and of a ragged batch over it, shared by kv_append, attention and decoder_step.
#pragma once
#include "../check.h"

namespace qk {

// k and v [P, Hkv, page, D] (int4: D / 2 bytes) and their scales [P, Hkv, 2, page]. Slices of a larger tensor will do
// as long as each page is dense; page_stride says how far apart pages are. Integer pages are uint8 with scales, and
// the last dimension tells int8 (D) from int4 (D / 2).
inline KvPages make_pages(const char* op, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scale,
                          const std::optional<Tensor>& v_scale, int64_t kv_heads, int64_t dim) {
  KvPages p{};
  check(k.is_cpu() && v.is_cpu(), op, "k_pages and v_pages must be on the CPU");
  check(k.dim() == 4, op, "k_pages must be [P, Hkv, page, D], got ", shape_of(k));
  check(dim >= 16 && dim % 16 == 0 && dim <= 512, op, "head_dim must be a multiple of 16, at most 512, got ", dim);
  p.pages = k.size(0), p.kv_heads = k.size(1), p.page = k.size(2), p.dim = dim;
  check(p.kv_heads == kv_heads, op, "k_pages must have ", kv_heads, " KV heads, got ", p.kv_heads);
  check(p.page >= 16 && p.page % 16 == 0, op, "a page must hold a positive multiple of 16 tokens, got ", p.page);
  const ScalarType type = k.scalar_type();
  switch (type) {
    case ScalarType::Float: p.type = KvType::f32; break;
    case ScalarType::Half: p.type = KvType::f16; break;
    case ScalarType::BFloat16: p.type = KvType::bf16; break;
    case ScalarType::Byte: p.type = k.size(3) == dim ? KvType::int8 : KvType::int4; break;
    default: fail(op, "k_pages must be float32, float16, bfloat16 or uint8, got ", type_name(type));
  }
  const bool integer = type == ScalarType::Byte;
  const int64_t row = p.type == KvType::int4 ? dim / 2 : dim;
  const Tensor* both[] = {&k, &v};
  const char* names[] = {"k_pages", "v_pages"};
  for (int i = 0; i < 2; i++) {
    const Tensor& t = *both[i];
    check(t.scalar_type() == type, op, names[i], " must be ", type_name(type), ", got ", type_name(t.scalar_type()));
    check(t.dim() == 4 && t.size(0) == p.pages && t.size(1) == p.kv_heads && t.size(2) == p.page && t.size(3) == row, op,
          names[i], " must be [", p.pages, ", ", p.kv_heads, ", ", p.page, ", ", row, "], got ", shape_of(t));
    check(t.numel() == 0 || (t.stride(3) == 1 && t.stride(2) == row && t.stride(1) == row * p.page), op, names[i],
          " must be dense within a page");
  }
  p.page_stride = p.pages > 1 ? k.stride(0) : p.kv_heads * p.page * row;
  check(p.pages <= 1 || (v.stride(0) == p.page_stride && p.page_stride >= p.kv_heads * p.page * row), op,
        "pages of k_pages and v_pages must be the same distance apart, and must not overlap");
  p.k = k.mutable_data_ptr(), p.v = v.mutable_data_ptr();
  check(k_scale.has_value() == integer && v_scale.has_value() == integer, op,
        integer ? "integer pages need k_scale and v_scale" : "k_scale and v_scale belong to integer pages only");
  p.scale_page_stride = p.kv_heads * 2 * p.page;
  if (integer) {
    const Tensor* scales[] = {&*k_scale, &*v_scale};
    const char* scale_names[] = {"k_scale", "v_scale"};
    for (int i = 0; i < 2; i++) {
      const Tensor& t = *scales[i];
      check(t.scalar_type() == ScalarType::Half, op, scale_names[i], " must be float16, got ", type_name(t.scalar_type()));
      check(t.is_cpu() && t.dim() == 4 && t.size(0) == p.pages && t.size(1) == p.kv_heads && t.size(2) == 2 && t.size(3) == p.page,
            op, scale_names[i], " must be [", p.pages, ", ", p.kv_heads, ", 2, ", p.page, "] on the CPU, got ", shape_of(t));
      check(t.numel() == 0 || (t.stride(3) == 1 && t.stride(2) == p.page && t.stride(1) == 2 * p.page), op, scale_names[i],
            " must be dense within a page");
    }
    if (p.pages > 1) p.scale_page_stride = k_scale->stride(0);
    check(p.pages <= 1 || v_scale->stride(0) == p.scale_page_stride, op, "pages of k_scale and v_scale must be the same distance apart");
    p.k_scale = mutable_data<uint16_t>(*k_scale), p.v_scale = mutable_data<uint16_t>(*v_scale);
  }
  return p;
}

// Pages of all layers, k and v [L, P, Hkv, page, D]: those of layer 0, and how far apart layers are (bytes for k and v,
// elements for scales).
struct LayeredPages {
  KvPages first;
  int64_t k_bytes, v_bytes, scale_elements;
};
inline LayeredPages make_layered_pages(const char* op, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scale,
                                       const std::optional<Tensor>& v_scale, int64_t layers, int64_t kv_heads, int64_t dim) {
  const auto check_layers = [&](const char* name, const Tensor& t, const char* shape) {
    check(t.dim() == 5 && t.size(0) >= layers && t.size(0) == k.size(0), op, name, " must be [layers >= ", layers, ", ", shape, "], got ", shape_of(t));
  };
  check_layers("k_pages", k, "P, Hkv, page, D");
  check_layers("v_pages", v, "P, Hkv, page, D");
  const auto first = [](const Tensor& t) { return torch::stable::select(t, 0, 0); };
  LayeredPages p{};
  std::optional<Tensor> ks, vs;
  if (k_scale && v_scale) {
    check_layers("k_scale", *k_scale, "P, Hkv, 2, page");
    check_layers("v_scale", *v_scale, "P, Hkv, 2, page");
    check(k_scale->stride(0) == v_scale->stride(0), op, "layers of k_scale and v_scale must be the same distance apart");
    ks = first(*k_scale), vs = first(*v_scale);
    p.scale_elements = k_scale->stride(0);
  }
  check(k_scale.has_value() == v_scale.has_value(), op, "k_scale and v_scale go together");
  p.first = make_pages(op, first(k), first(v), ks, vs, kv_heads, dim);
  p.k_bytes = k.stride(0) * int64_t(k.element_size());
  p.v_bytes = v.stride(0) * int64_t(v.element_size());
  return p;
}

// query_start [B + 1], kv_len [B] and page_table [B, pages per sequence], all int32; every index that a kernel will
// follow is checked here.
inline Ragged make_ragged(const char* op, const Tensor& query_start, const Tensor& kv_len, const Tensor& page_table,
                          int64_t tokens, const KvPages& pages) {
  Ragged r{};
  expect(op, "kv_len", kv_len, ScalarType::Int, {-1});
  r.batch = kv_len.size(0), r.tokens = tokens;
  expect(op, "query_start", query_start, ScalarType::Int, {r.batch + 1});
  expect(op, "page_table", page_table, ScalarType::Int, {r.batch, -1});
  check(kv_len.is_cpu() && query_start.is_cpu() && page_table.is_cpu(), op, "query_start, kv_len and page_table must be on the CPU");
  r.table_stride = page_table.size(1);
  r.query_start = data<int32_t>(query_start), r.kv_len = data<int32_t>(kv_len), r.page_table = data<int32_t>(page_table);
  check(r.query_start[0] == 0 && r.query_start[r.batch] == tokens, op, "query_start must run from 0 to the ", tokens,
        " tokens, got ", r.query_start[0], " to ", r.query_start[r.batch]);
  for (int64_t b = 0; b < r.batch; b++) {
    const int64_t count = int64_t(r.query_start[b + 1]) - r.query_start[b], length = r.kv_len[b];
    check(count >= 0, op, "query_start must not decrease, but sequence ", b, " goes from ", r.query_start[b], " to ", r.query_start[b + 1]);
    check(length >= count, op, "kv_len[", b, "] = ", length, " is less than the ", count, " tokens of sequence ", b);
    const int64_t used = (length + pages.page - 1) / pages.page;
    check(used <= r.table_stride, op, "sequence ", b, " of ", length, " tokens needs ", used, " pages, page_table has ", r.table_stride);
    for (int64_t i = 0; i < used; i++) {
      const int64_t page = r.page_table[b * r.table_stride + i];
      check(page >= 0 && page < pages.pages, op, "page_table[", b, ", ", i, "] = ", page, " is not one of the ", pages.pages, " pages");
    }
  }
  return r;
}

}  // namespace qk
