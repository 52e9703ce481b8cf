// The attention ops on the CPU; their checks are in attention_ops.h and append_attention_ops.h.
#include "../append_attention_ops.h"

#include "kernels.h"
#include "run.h"
#include "scratch.h"

namespace qk {
namespace {

// Threads for a call. What one core does in the time that a second one takes to start is few keys:
// 9 heads of 64 dims, one token and 64 keys of int8 take 17 us alone and 28 us with two (Zen 3).
int team_for(int64_t products) { return products <= (192 << 10) ? 1 : team_size(); }

// Multiplications of a query with all keys and values of its sequence, over the batch.
template <class Length>
int64_t products_of(int64_t batch, const int32_t* query_start, int64_t row, Length length) {
  int64_t sum = 0;
  for (int64_t b = 0; b < batch; b++)
    sum += int64_t(query_start[b + 1] - query_start[b]) * length(b);
  return 2 * row * sum;
}

// A kernel with scratch that the team shares.
template <class Args>
void run(const Tensor& q, const Args& args, int size, int64_t (*scratch_bytes)(const Args&, int),
         void (*kernel)(const Args&, void*, Team&)) {
  Scratch scratch;
  const int64_t at = scratch.reserve(scratch_bytes(args, size));
  scratch.allocate(q);
  run_team(size, [&](Team& team) { kernel(args, scratch.at(at), team); });
}

void run_paged(const char*, const Tensor& q, const AttentionArgs& args) {
  const Ragged& r = args.batch;
  const int64_t products =
      products_of(r.batch, r.query_start, args.q_heads * args.pages.dim, [&](int64_t b) {
        return args.window > 0 ? std::min<int64_t>(r.kv_len[b], args.window) : r.kv_len[b];
      });
  run(q, args, team_for(products), kernels().attention_scratch, kernels().attention);
}
void run_dense(const char*, const Tensor& q, const DenseAttentionArgs& args) {
  const int64_t products =
      products_of(args.batch, args.query_start, args.q_heads * args.dim,
                  [&](int64_t b) { return args.kv_start[b + 1] - args.kv_start[b]; });
  run(q, args, team_for(products), kernels().attention_dense_scratch, kernels().attention_dense);
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("attention", TORCH_BOX((&attention<run_paged, Contents::checked>)));
  m.impl("append_attention", TORCH_BOX((&append_attention<run_paged, Contents::checked>)));
  m.impl("attention_dense", TORCH_BOX((&attention_dense<run_dense, Contents::checked>)));
}

}  // namespace
}  // namespace qk
