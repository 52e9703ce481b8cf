// append_attention, but for who computes: kv_append and attention with one set of checks.
#pragma once
#include "attention_ops.h"
#include "kv_append_ops.h"

namespace qk {

// The arguments of kv_append, then the options of attention -> [T, Hq, D]
template <AttentionRun kRun, Contents kContents>
Tensor append_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& rope, const std::optional<Tensor>& positions,
                        const Tensor& query_start, const Tensor& kv_len, const Tensor& page_table,
                        const Tensor& k_pages, const Tensor& v_pages,
                        const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                        double scale, bool causal, int64_t window, double softcap,
                        const std::optional<Tensor>& sinks,
                        const std::optional<Tensor>& alibi_slopes,
                        const std::optional<Tensor>& distance_bias) {
  const char* op = "append_attention";
  KvAppendArgs append = kv_append_args<kContents>(op, q, k, v, rope, positions, query_start, kv_len,
                                                  page_table, k_pages, v_pages, k_scale, v_scale);
  const int64_t dim = q.size(2);
  AttentionArgs attend{};
  set_scores(op, attend, q, scale, causal, window, softcap, sinks, alibi_slopes, distance_bias);
  attend.type = append.type;
  attend.q_stride = append.q_heads * dim, attend.q_heads = append.q_heads;
  attend.pages = append.pages, attend.batch = append.batch;
  const Tensor rotated = empty_on(q, {q.size(0), append.q_heads, dim});
  Tensor out = empty_on(q, {q.size(0), append.q_heads, dim});
  if (out.numel() == 0) return out;
  append.q_out = mutable_data(rotated);
  run_kv_append(op, q, append);
  // To launches of their own.
  for (const Tensor* t : {&query_start, &kv_len, &page_table, &k_pages, &v_pages})
    hand_over(*t, Hand::read);
  for (const auto* t : {&k_scale, &v_scale, &sinks, &alibi_slopes, &distance_bias})
    if (*t) hand_over(**t, Hand::read);
  attend.q = data(rotated), attend.out = mutable_data(out);
  kRun(op, q, attend);
  return out;
}

}  // namespace qk
