// The second half of split decode attention.
#pragma once
#include "attention_decode.cuh"

namespace qk {

// A warp per token and head adds the splits up, in their order.
constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads)
    attention_merge_kernel(const AttentionTask task, const AttentionParts parts, int splits) {
  const int64_t rows = task.tokens * task.q_heads;
  const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, head = int(row % task.q_heads);
  dependency_launch();
  dependency_wait();
  const Sequence s =
      sequence_of(task, sequence_at(task.query_start, task.batch, row / task.q_heads));
  const int64_t token = row / task.q_heads - s.first_token;
  if (!takes(task, s) || token < 0 || token >= s.count) return;  // also beyond the last row
  const float sink = sink_score(task, head);
  float most = larger(sink, kLowest);
  for (int i = 0; i < splits; i++) most = larger(parts.reference[i * rows + row], most);
  float l = exp2_approx(sink - most);
  for (int i = 0; i < splits; i++)
    l += parts.total[i * rows + row] * exp2_approx(parts.reference[i * rows + row] - most);
  const float times = l == 0.f ? 0.f : 1.f / l;
  for (int dim = lane; dim < task.dim; dim += 32) {
    float v = 0;
    for (int i = 0; i < splits; i++)
      v += parts.sum[(i * rows + row) * task.dim + dim] *
           exp2_approx(parts.reference[i * rows + row] - most);
    store_float(task.out, task.type, row * task.dim + dim, v * times);
  }
}

}  // namespace qk
