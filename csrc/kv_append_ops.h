// kv_append, but for who computes. Checks and allocates, then calls kRun(op, q, args), unless there
// are no tokens.
#pragma once
#include "kv_cache.h"

namespace qk {

// Where contents are unchecked, positions may be anything too; see attention_ops.h.
using KvAppendRun = void (*)(const char* op, const Tensor& q, const KvAppendArgs&);
// That of this library, for append_attention as well.
void run_kv_append(const char* op, const Tensor& q, const KvAppendArgs&);

// Every token's row of rope is there.
inline void check_rope_rows(const char* op, const KvAppendArgs& a) {
  if (!a.rope) return;
  if (a.positions) {
    for (int64_t t = 0; t < a.batch.tokens; t++)
      check(a.positions[t] >= 0 && a.positions[t] < a.rope_positions, op, "positions[", t,
            "] must be in [0, ", a.rope_positions, "), the rows of rope, got ", a.positions[t]);
    return;
  }
  for (int64_t b = 0; b < a.batch.batch; b++)
    check(a.batch.query_start[b] == a.batch.query_start[b + 1] ||
              a.batch.kv_len[b] <= a.rope_positions,
          op, "kv_len[", b, "] = ", a.batch.kv_len[b], " passes the ", a.rope_positions,
          " rows of rope");
}

// What both ops that append are told, checked; for the caller to add: where the rotated q goes.
template <Contents kContents>
KvAppendArgs kv_append_args(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& rope,
                            const std::optional<Tensor>& positions, const Tensor& query_start,
                            const Tensor& kv_len, const Tensor& page_table, const Tensor& k_pages,
                            const Tensor& v_pages, const std::optional<Tensor>& k_scale,
                            const std::optional<Tensor>& v_scale) {
  KvAppendArgs a{};
  const int64_t dim = head_dim(op, q), tokens = q.size(0);
  a.type = float_type(op, "q", q.scalar_type());
  a.q_stride = token_stride(op, "q", q, "q", q);
  a.k_stride = token_stride(op, "k", k, "q", q);
  a.v_stride = token_stride(op, "v", v, "q", q);
  a.q_heads = q.size(1);
  a.pages = make_pages(op, dim, k_pages, v_pages, k_scale, v_scale, "q", q, Pages::written);
  check_heads(op, a.q_heads, a.pages.kv_heads);
  expect_keys(op, q, k, v, tokens, a.pages.kv_heads);
  a.batch = make_ragged(op, tokens, a.pages, query_start, kv_len, page_table, "q", q, kContents);
  check(rope || !positions, op, "positions need rope");
  if (rope) {
    expect(op, "rope", *rope, ScalarType::Float, {-1, -1});
    same_device(op, "rope", *rope, "q", q);
    a.rope = data<float>(rope);
    a.rope_positions = rope->size(0);
    const int64_t rotary = rope->size(1);
    check(rotary > 0 && rotary % 2 == 0 && rotary <= dim, op,
          "rope must have an even number of columns up to ", dim, ", got ", shape_of(*rope));
    a.rotary_dim = int(rotary);
  }
  if (positions) {
    expect(op, "positions", *positions, ScalarType::Int, {tokens});
    same_device(op, "positions", *positions, "q", q);
    a.positions = data<int32_t>(positions);
  }
  if constexpr (kContents == Contents::checked) check_rope_rows(op, a);
  a.q = data(q), a.k = data(k), a.v = data(v);
  return a;
}

// q [T, Hq, D]; k, v [T, Hkv, D]; rope [positions, rotary_dim] float32; positions [T] int32;
// query_start [B + 1], kv_len [B], page_table [B, pages per sequence] int32; pages as in attention
// -> q, rotated [T, Hq, D]
template <KvAppendRun kRun, Contents kContents>
Tensor kv_append(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& rope, const std::optional<Tensor>& positions,
                 const Tensor& query_start, const Tensor& kv_len, const Tensor& page_table,
                 const Tensor& k_pages, const Tensor& v_pages, const std::optional<Tensor>& k_scale,
                 const std::optional<Tensor>& v_scale) {
  const char* op = "kv_append";
  KvAppendArgs a = kv_append_args<kContents>(op, q, k, v, rope, positions, query_start, kv_len,
                                             page_table, k_pages, v_pages, k_scale, v_scale);
  Tensor out = empty_on(q, {q.size(0), a.q_heads, q.size(2)});
  if (q.size(0) == 0) return out;
  a.q_out = mutable_data(out);
  kRun(op, q, a);
  return out;
}

}  // namespace qk
