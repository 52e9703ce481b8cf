// Attention in float32 arithmetic, for what the kernels of 16-bit products do not take: float32
// queries, float32 pages, pages of bfloat16 under float16 queries, rows that are not 16-byte
// aligned. A block per token and query head; its warps take 32 keys in turn, a lane the dot product
// of one, then of all of them 32 dims at a time.
#pragma once
#include "attention_task.cuh"

namespace qk {

constexpr int kScalarWarps = 4, kScalarDims = 512;
struct ScalarShared {
  float q[kScalarDims];
  float most[kScalarWarps], total[kScalarWarps];
  float sum[kScalarWarps][kScalarDims];
};

// Element `dim` of a row of K or V; codes as they are.
template <KvType kKv>
__device__ __forceinline__ float load_kv(const uint8_t* row, int dim) {
  if constexpr (kKv == KvType::int4)
    return float(row[dim / 16 * 8 + dim % 8] >> (dim % 16 / 8 * 4) & 15);
  else if constexpr (kKv == KvType::int8) return float(row[dim]);
  else
    return load_float(row,
                      kKv == KvType::f32   ? Dtype::f32
                      : kKv == KvType::f16 ? Dtype::f16
                                           : Dtype::bf16,
                      dim);
}

template <KvType kKv>
__global__ void __launch_bounds__(32 * kScalarWarps)
    attention_scalar_kernel(const AttentionTask task) {
  constexpr bool kCodes = kKv == KvType::int8 || kKv == KvType::int4;
  constexpr int kPer = kScalarDims / 32;
  auto& shared = *shared_memory<ScalarShared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, token = row / task.q_heads;
  const int head = int(row % task.q_heads), kv_head = head / task.group;
  const int b = sequence_at(task.query_start, task.batch, token);
  const Sequence s = sequence_of(task, b);
  if (token < s.first_token || token >= s.first_token + s.count) return;

  for (int dim = threadIdx.x; dim < task.dim; dim += 32 * kScalarWarps)
    shared.q[dim] =
        load_float(task.q, task.type, token * task.q_stride + int64_t(head) * task.dim + dim);
  block_sync();
  float q_sum = 0;
  if constexpr (kCodes)
    for (int dim = 0; dim < task.dim; dim++) q_sum += shared.q[dim];

  const int64_t position = s.length - s.count + (token - s.first_token);
  const Seen seen = seen_keys(task, s, position);
  float most = kLowest, total = 0, acc[kPer] = {};
  for (int key0 = seen.first + 32 * warp; key0 < seen.last; key0 += 32 * kScalarWarps) {
    const int key = key0 + lane;
    KeyRun run{-1, 0};
    if (key < seen.last) run = key_run(task, s, b, key);
    const bool there = run.page >= 0;
    float score = bits_float(int32_t(0xff800000)), v_scale = 1.f, v_zero = 0.f;
    const uint8_t* v_row = v_rows(task, kv_head, run);
    if (there) {
      const uint8_t* k_row = k_rows(task, kv_head, run);
      float dot = 0;
      for (int dim = 0; dim < task.dim; dim++)
        dot = fma(shared.q[dim], load_kv<kKv>(k_row, dim), dot);
      if constexpr (kCodes) {
        const int64_t at =
            run.page * task.scale_page_stride + int64_t(kv_head) * 2 * task.page + run.slot;
        auto half = [&](const uint16_t* p) { return widen(from_bits<half_t>(*p)); };
        dot = half(task.k_scale + at) * fma(-half(task.k_scale + at + task.page), q_sum, dot);
        v_scale = half(task.v_scale + at), v_zero = half(task.v_scale + at + task.page);
      }
      score = dot * task.scale * kLog2E;
      if (bends(task)) score = bend_score(task, score, head, key - position);
    }
    float greatest = score;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      greatest = larger(greatest, shuffle_xor(greatest, mask));
    greatest = larger(greatest, most);
    const float drop = exp2_approx(most - greatest);
    most = greatest;
    const float weight = exp2_approx(score - most);
    total = total * drop + weight;
#pragma unroll
    for (int i = 0; i < kPer; i++) acc[i] *= drop;
    const uint32_t all = ballot(there);
    for (int from = 0; from < 32; from++) {
      if (!(all >> from & 1)) continue;  // what is not there may be NaN
      const float w = shuffle(weight * v_scale, from), zero = shuffle(v_zero, from);
      const auto* v =
          reinterpret_cast<const uint8_t*>(shuffle(reinterpret_cast<uint64_t>(v_row), from));
#pragma unroll
      for (int i = 0; i < kPer; i++)
        if (lane + 32 * i < task.dim)
          acc[i] = fma(w, load_kv<kKv>(v, lane + 32 * i) - zero, acc[i]);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (lane == 0) shared.most[warp] = most, shared.total[warp] = total;
#pragma unroll
  for (int i = 0; i < kPer; i++) shared.sum[warp][lane + 32 * i] = acc[i];  // beyond D: zeros
  block_sync();
  const float sink = sink_score(task, head);
  float top = larger(sink, kLowest);
  for (int w = 0; w < kScalarWarps; w++) top = larger(shared.most[w], top);
  float l = exp2_approx(sink - top);
  for (int w = 0; w < kScalarWarps; w++) l += shared.total[w] * exp2_approx(shared.most[w] - top);
  const float times = l == 0.f ? 0.f : 1.f / l;
  for (int dim = threadIdx.x; dim < task.dim; dim += 32 * kScalarWarps) {
    float v = 0;
    for (int w = 0; w < kScalarWarps; w++)
      v += shared.sum[w][dim] * exp2_approx(shared.most[w] - top);
    store_float(task.out, task.type, row * task.dim + dim, v * times);
  }
}

inline cudaError_t launch_attention_scalar(const AttentionTask& task, cudaStream_t stream) {
  const int64_t rows = task.tokens * task.q_heads;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  auto of = [&](auto kernel) {
    return launch(kernel, dim3(unsigned(rows)), dim3(32 * kScalarWarps), sizeof(ScalarShared),
                  stream, task);
  };
  switch (task.kv) {
    case KvType::f32: return of(attention_scalar_kernel<KvType::f32>);
    case KvType::f16: return of(attention_scalar_kernel<KvType::f16>);
    case KvType::bf16: return of(attention_scalar_kernel<KvType::bf16>);
    case KvType::int8: return of(attention_scalar_kernel<KvType::int8>);
    case KvType::int4: return of(attention_scalar_kernel<KvType::int4>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
