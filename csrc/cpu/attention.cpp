// The attention ops on the CPU; their checks are in attention_ops.h.
#include "../attention_ops.h"

#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

// A kernel with scratch that the team shares.
template <class Args>
void run(const Tensor& q, const Args& args, int64_t (*scratch_bytes)(const Args&, int),
         void (*kernel)(const Args&, void*, Team&)) {
  const int size = team_size();
  const Tensor scratch = torch::stable::new_empty(q, {scratch_bytes(args, size)}, ScalarType::Byte);
  void* memory = mutable_data(scratch);
  run_team(size, [&](Team& team) { kernel(args, memory, team); });
}

void run_paged(const char*, const Tensor& q, const AttentionArgs& args) {
  run(q, args, kernels().attention_scratch, kernels().attention);
}
void run_dense(const char*, const Tensor& q, const DenseAttentionArgs& args) {
  run(q, args, kernels().attention_dense_scratch, kernels().attention_dense);
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("attention", TORCH_BOX((&attention<run_paged, Contents::checked>)));
  m.impl("attention_dense", TORCH_BOX((&attention_dense<run_dense, Contents::checked>)));
}

}  // namespace
}  // namespace qk
