// The attention ops on CUDA; their checks are in attention_ops.h and append_attention_ops.h.
//
// Which kernel: products of 16-bit numbers where keys and queries are such (or codes), split over
// the keys for few new tokens per sequence, in tiles for many; else float32 arithmetic.
#include "../append_attention_ops.h"

#include "attention_decode.cuh"
#include "attention_merge.cuh"
#include "attention_prefill.cuh"
#include "attention_scalar.cuh"
#include "device.h"

namespace qk {
namespace {

// Every row of keys and values starts at a multiple of what one copy brings.
bool rows_are_aligned(const AttentionTask& task) {
  const int64_t unit = task.kv == KvType::int4 ? 8 : 16;
  const auto on = [](const void* p, int64_t unit) {
    return reinterpret_cast<uintptr_t>(p) % uintptr_t(unit) == 0;
  };
  return on(task.k, unit) && on(task.v, unit) && task.k_row % unit == 0 && task.v_row % unit == 0 &&
         task.page_stride % unit == 0 && on(task.k_scale, 4) && on(task.v_scale, 4) &&
         task.scale_page_stride % 2 == 0;
}

DecodePlan plan_decode(const AttentionTask& task, bool mixed, const DeviceLimits& limits) {
  DecodePlan plan{};
  plan.dim = task.dim <= 64 ? 64 : task.dim <= 128 ? 128 : task.dim <= 256 ? 256 : 512;
  // Bounds are all the host knows: tokens are taken to be spread evenly, or, beside sequences that
  // prefill, to be one each. A block takes what rows there are beyond.
  const int64_t each = mixed ? 1 : (task.tokens + task.batch - 1) / task.batch;
  const int64_t rows = each * task.group;
  const bool rows_of_one_tile = rows <= 8, sums_fit_registers = plan.dim <= 128;
  plan.rows_of_8 = !rows_of_one_tile && sums_fit_registers ? 2 : 1;
  plan.row_tiles = int((rows + 8 * plan.rows_of_8 - 1) / (8 * plan.rows_of_8));
  // As many splits as fill the multiprocessors once, of no less than 4 steps of 64 keys.
  const int64_t blocks = int64_t(plan.row_tiles) * task.kv_heads * task.batch;
  const int at_once_each = plan.dim * plan.rows_of_8 <= 128 ? 3 : plan.dim <= 128 ? 2 : 1;
  const int64_t at_once = int64_t(limits.multiprocessors) * at_once_each;
  const int64_t most = std::max<int64_t>(1, task.most_keys / 256);
  plan.splits = int(std::clamp<int64_t>(at_once / blocks, 1, std::min<int64_t>(most, 128)));
  if (plan.splits > 1)
    plan.scratch = plan.splits * task.tokens * task.q_heads * (task.dim + 2) * int64_t(4);
  return plan;
}

cudaError_t launch_decode(const AttentionTask& task, const DecodePlan& plan, void* scratch,
                          cudaStream_t stream) {
  const int64_t rows = plan.splits * task.tokens * task.q_heads;
  AttentionParts parts{};
  parts.reference = static_cast<float*>(scratch);
  parts.total = parts.reference + rows, parts.sum = parts.total + rows;
  const auto launch_pages = task.kv == KvType::f16    ? launch_attention_decode_f16
                            : task.kv == KvType::bf16 ? launch_attention_decode_bf16
                            : task.kv == KvType::int8 ? launch_attention_decode_int8
                                                      : launch_attention_decode_int4;
  if (cudaError_t error = launch_pages(task, parts, plan, stream); error != cudaSuccess)
    return error;
  if (plan.splits == 1) return cudaSuccess;
  const int64_t blocks =
      (task.tokens * task.q_heads + kMergeThreads / 32 - 1) / (kMergeThreads / 32);
  return launch_dependent(attention_merge_kernel, dim3(unsigned(blocks)), dim3(kMergeThreads), 0,
                          stream, task, parts, plan.splits);
}

void run_task(const char* op, const Tensor& q, AttentionTask task) {
  const bool codes = task.kv == KvType::int8 || task.kv == KvType::int4;
  const bool keys_of_16_bits = codes || task.kv == KvType::f16 || task.kv == KvType::bf16;
  // float16 has three bits more than bfloat16, which rounding a query would lose.
  const bool query_fits = task.type == Dtype::bf16 || task.kv != KvType::bf16;
  const bool tensor_cores = task.type != Dtype::f32 && keys_of_16_bits && query_fits &&
                            task.kv_heads <= 65535 && rows_are_aligned(task);
  check(task.tokens * task.q_heads <= INT32_MAX, op,
        "q has more rows than a grid has blocks: ", task.tokens * task.q_heads);
  if (task.batch == 0) return;
  if (!tensor_cores)
    return launch_on(op, q,
                     [&](cudaStream_t stream) { return launch_attention_scalar(task, stream); });

  // A sequence's tokens are known on the device alone. Few in all, or on average: decode takes
  // every sequence, whatever it has; else each kernel takes its own.
  const bool decode_only = task.tokens <= kDecodeTokens * int64_t(task.batch);
  const bool prefill_only = !decode_only && task.batch == 1;
  AttentionTask few = task, many = task;
  if (!decode_only) few.most_new = kDecodeTokens, many.least_new = kDecodeTokens + 1;
  DeviceLimits limits{};
  Tensor scratch = empty_on(q, {0}, ScalarType::Byte);
  DecodePlan plan{};
  launch_on(op, q, [&](cudaStream_t stream) {
    if (cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
    // Blocks of 8.6, 8.9 and 12.0 have 99 KB, which the larger tiles pass.
    const bool roomy = limits.shared_per_block >= 144 << 10;
    const bool decode_fits = roomy || task.dim <= 128;
    const bool prefill_fits = roomy || task.dim <= (codes ? 64 : 96);
    if ((!prefill_only && !decode_fits) || (!decode_only && !prefill_fits))
      return launch_attention_scalar(task, stream);
    if (!prefill_only) {
      plan = plan_decode(few, !decode_only, limits);
      if (plan.scratch) scratch = empty_on(q, {plan.scratch}, ScalarType::Byte);
      if (cudaError_t error = launch_decode(few, plan, mutable_data(scratch), stream);
          error != cudaSuccess)
        return error;
    }
    if (decode_only) return cudaSuccess;
    return task.kv == KvType::f16    ? launch_attention_prefill_f16(many, stream)
           : task.kv == KvType::bf16 ? launch_attention_prefill_bf16(many, stream)
                                     : launch_attention_prefill_codes(many, stream);
  });
}

void run(const char* op, const Tensor& q, const AttentionArgs& args) {
  run_task(op, q, attention_task(args));
}
void run_dense(const char* op, const Tensor& q, const DenseAttentionArgs& args) {
  run_task(op, q, attention_task(args));
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("attention", TORCH_BOX((&attention<run, Contents::unchecked>)));
  m.impl("append_attention", TORCH_BOX((&append_attention<run, Contents::unchecked>)));
  m.impl("attention_dense", TORCH_BOX((&attention_dense<run_dense, Contents::unchecked>)));
}

}  // namespace
}  // namespace qk
