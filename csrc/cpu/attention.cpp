// Boundary of attention over a paged cache and over dense keys.
#include "attention.h"

#include <algorithm>

#include "run.h"

namespace qk {
namespace {

constexpr int64_t kMaxWindow = INT32_MAX;  // no sequence is longer; a position minus it is in range

void check_options(const char* op, double scale, int64_t window, double softcap) {
  check(scale == scale, op, "scale must be a number, got ", scale);
  check(window >= 0, op, "window must be 0 (off) or positive, got ", window);
  check(softcap >= 0, op, "softcap must be 0 (off) or positive, got ", softcap);
}

// A kernel with scratch that the team shares.
template <class Args>
void run(const Tensor& q, const Args& args, int64_t (*scratch_bytes)(const Args&, int),
         void (*kernel)(const Args&, void*, Team&)) {
  const int size = team_size();
  const Tensor scratch = torch::stable::new_empty(q, {scratch_bytes(args, size)}, ScalarType::Byte);
  void* memory = mutable_data(scratch);
  run_team(size, [&](Team& team) { kernel(args, memory, team); });
}

// q [T, Hq, D]; query_start [B + 1], kv_len [B], page_table [B, pages per sequence] int32; k_pages,
// v_pages [P, Hkv, page, D]; k_scale, v_scale [P, Hkv, 2, page] -> [T, Hq, D]
Tensor attention(const Tensor& q, const Tensor& query_start, const Tensor& kv_len,
                 const Tensor& page_table, const Tensor& k_pages, const Tensor& v_pages,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                 double scale, bool causal, int64_t window, double softcap) {
  const char* op = "attention";
  AttentionArgs a{};
  const int64_t dim = head_dim(op, q);
  a.type = float_type(op, "q", q.scalar_type());
  a.q_stride = token_stride(op, "q", q);
  a.q_heads = q.size(1);
  a.pages = make_pages(op, dim, k_pages, v_pages, k_scale, v_scale);
  check_heads(op, a.q_heads, a.pages.kv_heads);
  check_options(op, scale, window, softcap);
  a.batch = make_ragged(op, q.size(0), a.pages, query_start, kv_len, page_table);
  a.scale = float(scale), a.causal = causal, a.window = std::min(window, kMaxWindow),
  a.softcap = float(softcap);
  Tensor out = torch::stable::new_empty(q, {q.size(0), a.q_heads, dim});
  if (out.numel() == 0) return out;
  a.q = data(q), a.out = mutable_data(out);
  run(q, a, kernels().attention_scratch, kernels().attention);
  return out;
}

// q [Tq, Hq, D]; k, v [Tk, Hkv, D]; query_start, kv_start [B + 1] int32 -> [Tq, Hq, D]
Tensor attention_dense(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_start,
                       const Tensor& kv_start, double scale, bool causal, int64_t window,
                       double softcap) {
  const char* op = "attention_dense";
  DenseAttentionArgs a{};
  a.dim = head_dim(op, q);
  a.type = float_type(op, "q", q.scalar_type());
  a.q_stride = token_stride(op, "q", q);
  a.k_stride = token_stride(op, "k", k);
  a.v_stride = token_stride(op, "v", v);
  a.q_heads = q.size(1), a.kv_heads = k.size(1), a.tokens = q.size(0);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check(t.scalar_type() == q.scalar_type(), op, name, " must be ", type_name(q.scalar_type()),
          " like q, got ", type_name(t.scalar_type()));
    check(t.size(0) == k.size(0) && t.size(1) == a.kv_heads && t.size(2) == a.dim, op, name,
          " must be [", k.size(0), ", ", a.kv_heads, ", ", a.dim, "], got ", shape_of(t));
  }
  check_heads(op, a.q_heads, a.kv_heads);
  check_options(op, scale, window, softcap);
  a.query_start = starts(op, "query_start", query_start, a.tokens);
  a.kv_start = starts(op, "kv_start", kv_start, k.size(0));
  a.batch = query_start.size(0) - 1;
  check(kv_start.size(0) == a.batch + 1, op, "kv_start must be [", a.batch + 1,
        "] like query_start, got ", shape_of(kv_start));
  a.scale = float(scale), a.causal = causal, a.window = std::min(window, kMaxWindow),
  a.softcap = float(softcap);
  Tensor out = torch::stable::new_empty(q, {a.tokens, a.q_heads, a.dim});
  if (out.numel() == 0) return out;
  a.q = data(q), a.k = data(k), a.v = data(v), a.out = mutable_data(out);
  run(q, a, kernels().attention_dense_scratch, kernels().attention_dense);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_dense", TORCH_BOX(&attention_dense));
}

}  // namespace
}  // namespace qk
