// attention and attention_dense, but for who computes. Checks and allocates, then calls
// kRun(op, q, args), unless there is nothing to compute.
#pragma once
#include <algorithm>

#include "kv_cache.h"

namespace qk {

constexpr int64_t kMaxWindow = INT32_MAX;  // no sequence is longer; a position minus it is in range

// Where contents are unchecked, query_start, kv_len and page_table may be anything: whoever runs
// must read and write nothing beyond its tensors, or leave it to the caller to keep them in range.
using AttentionRun = void (*)(const char* op, const Tensor& q, const AttentionArgs&);
using DenseAttentionRun = void (*)(const char* op, const Tensor& q, const DenseAttentionArgs&);

// sinks [Hq], alibi_slopes [Hq], distance_bias [Hq, 2 reach + 1], float32 or none.
inline ScoreBias make_score_bias(const char* op, const Tensor& q,
                                 const std::optional<Tensor>& sinks,
                                 const std::optional<Tensor>& alibi_slopes,
                                 const std::optional<Tensor>& distance_bias) {
  ScoreBias b{};
  const int64_t heads = q.size(1);
  const auto by_head = [&](const char* name, const std::optional<Tensor>& t,
                           std::initializer_list<int64_t> sizes) {
    if (t) expect(op, name, *t, ScalarType::Float, sizes);
    same_device(op, name, t, "q", q);
  };
  by_head("sinks", sinks, {heads});
  by_head("alibi_slopes", alibi_slopes, {heads});
  by_head("distance_bias", distance_bias, {heads, -1});
  if (distance_bias) {
    const int64_t columns = distance_bias->size(1);
    check(columns % 2 == 1, op,
          "distance_bias must have an odd number of columns, 2 reach + 1, got ",
          shape_of(*distance_bias));
    b.reach = columns / 2;
  }
  b.sinks = data<float>(sinks), b.alibi_slopes = data<float>(alibi_slopes);
  b.distance_bias = data<float>(distance_bias);
  return b;
}

// What a score is made of, for both ops.
template <class Args>
void set_scores(const char* op, Args& a, const Tensor& q, double scale, bool causal, int64_t window,
                double softcap, const std::optional<Tensor>& sinks,
                const std::optional<Tensor>& alibi_slopes,
                const std::optional<Tensor>& distance_bias) {
  check(scale == scale, op, "scale must be a number, got ", scale);
  check(window >= 0, op, "window must be 0 (off) or positive, got ", window);
  check(softcap >= 0, op, "softcap must be 0 (off) or positive, got ", softcap);
  a.scale = float(scale), a.causal = causal, a.window = std::min(window, kMaxWindow),
  a.softcap = float(softcap);
  a.bias = make_score_bias(op, q, sinks, alibi_slopes, distance_bias);
}

// q [T, Hq, D]; query_start [B + 1], kv_len [B], page_table [B, pages per sequence] int32; k_pages,
// v_pages [P, Hkv, page, D]; k_scale, v_scale [P, Hkv, 2, page]; biases as above -> [T, Hq, D]
template <AttentionRun kRun, Contents kContents>
Tensor attention(const Tensor& q, const Tensor& query_start, const Tensor& kv_len,
                 const Tensor& page_table, const Tensor& k_pages, const Tensor& v_pages,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                 double scale, bool causal, int64_t window, double softcap,
                 const std::optional<Tensor>& sinks, const std::optional<Tensor>& alibi_slopes,
                 const std::optional<Tensor>& distance_bias) {
  const char* op = "attention";
  AttentionArgs a{};
  const int64_t dim = head_dim(op, q);
  a.type = float_type(op, "q", q.scalar_type());
  a.q_stride = token_stride(op, "q", q, "q", q);
  a.q_heads = q.size(1);
  a.pages = make_pages(op, dim, k_pages, v_pages, k_scale, v_scale, "q", q, Pages::read);
  check_heads(op, a.q_heads, a.pages.kv_heads);
  set_scores(op, a, q, scale, causal, window, softcap, sinks, alibi_slopes, distance_bias);
  a.batch = make_ragged(op, q.size(0), a.pages, query_start, kv_len, page_table, "q", q, kContents);
  Tensor out = empty_on(q, {q.size(0), a.q_heads, dim});
  if (out.numel() == 0) return out;
  a.q = data(q), a.out = mutable_data(out);
  kRun(op, q, a);
  return out;
}

// q [Tq, Hq, D]; k, v [Tk, Hkv, D]; query_start, kv_start [B + 1] int32; biases as above -> [Tq,
// Hq, D]
template <DenseAttentionRun kRun, Contents kContents>
Tensor attention_dense(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_start,
                       const Tensor& kv_start, double scale, bool causal, int64_t window,
                       double softcap, const std::optional<Tensor>& sinks,
                       const std::optional<Tensor>& alibi_slopes,
                       const std::optional<Tensor>& distance_bias) {
  const char* op = "attention_dense";
  DenseAttentionArgs a{};
  a.dim = head_dim(op, q);
  a.type = float_type(op, "q", q.scalar_type());
  a.q_stride = token_stride(op, "q", q, "q", q);
  a.k_stride = token_stride(op, "k", k, "q", q);
  a.v_stride = token_stride(op, "v", v, "q", q);
  a.q_heads = q.size(1), a.kv_heads = k.size(1), a.tokens = q.size(0), a.keys = k.size(0);
  expect_keys(op, q, k, v, k.size(0), a.kv_heads);
  check_heads(op, a.q_heads, a.kv_heads);
  set_scores(op, a, q, scale, causal, window, softcap, sinks, alibi_slopes, distance_bias);
  a.batch = sequences(op, "query_start", query_start, "q", q);
  const int64_t kv_batch = sequences(op, "kv_start", kv_start, "q", q);
  check(kv_batch == a.batch, op, "kv_start must be [", a.batch + 1, "] like query_start, got ",
        shape_of(kv_start));
  a.query_start = data<int32_t>(query_start), a.kv_start = data<int32_t>(kv_start);
  if constexpr (kContents == Contents::checked) {
    check_starts(op, "query_start", a.query_start, a.batch, a.tokens);
    check_starts(op, "kv_start", a.kv_start, a.batch, k.size(0));
  }
  Tensor out = empty_on(q, {a.tokens, a.q_heads, a.dim});
  if (out.numel() == 0) return out;
  a.q = data(q), a.k = data(k), a.v = data(v), a.out = mutable_data(out);
  kRun(op, q, a);
  return out;
}

}  // namespace qk
