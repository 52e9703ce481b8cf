// kv_append: RoPE on q and k, quantization of k and v, and their way into the pages, in one launch.
//
// A warp takes one row: a head of q, k or v of one token. It lies in shared memory between turning
// and storing, since pairs of the rotation and of the nibbles belong to different lanes. The
// numbers are those of the reference, operation for operation in float32, so codes and scales are
// the same bits. A token whose page or slot is out of range is not written; a position beyond the
// rows of rope turns by NaN.
#pragma once
#include "attention_task.cuh"

namespace qk {

constexpr int kAppendWarps = 4;

// x [D] -> codes, scale and zero point: scale = range / levels rounded up to float16, where the
// range includes 0; code = round(x / scale) + round(-low / scale).
struct RowScale {
  uint16_t scale, zero;  // fp16
  float divisor, shift;
  bool usable;  // else the codes are 0 and the scale is NaN
};
__device__ __forceinline__ RowScale row_scale(const float* x, int dim, int levels) {
  const int lane = threadIdx.x % 32;
  float low = 0, high = 0;
  bool finite = true;
  for (int d = lane; d < dim; d += 32) {
    const float v = x[d];
    low = v < low ? v : low, high = v > high ? v : high;
    finite = finite && v - v == 0.f;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(low, mask);
    low = other < low ? other : low;
    high = larger(high, shuffle_xor(high, mask));
  }
  const float exact = (high - low) / float(levels);
  RowScale r{0x7e00, 0, 1.f, 0.f, false};
  if (ballot(!finite) != 0 || !(exact < 65504.f)) return r;
  r.usable = true;
  r.scale = to_bits(narrow<half_t>(exact));
  if (widen(from_bits<half_t>(r.scale)) < exact) r.scale++;  // the next float16 up
  if (r.scale == 0) {
    r.divisor = bits_float(0x7f800000);  // infinity: every code is 0
    return r;
  }
  r.divisor = widen(from_bits<half_t>(r.scale));
  r.shift = float(round_int(-low / r.divisor));
  r.zero = to_bits(narrow<half_t>(r.shift));
  return r;
}
__device__ __forceinline__ uint32_t code_of(float v, const RowScale& r, int levels) {
  const int code = r.usable ? round_int(v / r.divisor) + int(r.shift) : 0;
  return uint32_t(smaller(larger(code, 0), levels));
}

// x [D] of this warp, in shared memory, into one slot of K or V pages.
__device__ __forceinline__ void put_row(const KvPages& p, void* pages, uint16_t* scales,
                                        int64_t page, int head, int64_t slot, const float* x) {
  const int lane = threadIdx.x % 32, dim = int(p.dim);
  const int64_t row = head * p.page + slot;
  if (p.type != KvType::int8 && p.type != KvType::int4) {
    const Dtype type = p.type == KvType::f32   ? Dtype::f32
                       : p.type == KvType::f16 ? Dtype::f16
                                               : Dtype::bf16;
    for (int d = lane; d < dim; d += 32)
      store_float(pages, type, page * p.page_stride + row * dim + d, x[d]);
    return;
  }
  const bool nibbles = p.type == KvType::int4;
  const int levels = nibbles ? 15 : 255;
  const RowScale r = row_scale(x, dim, levels);
  uint8_t* to =
      static_cast<uint8_t*>(pages) + page * p.page_stride + row * (nibbles ? dim / 2 : dim);
  if (nibbles) {
    for (int i = lane; i < dim / 2; i += 32) {  // byte i % 8 of the run of dims 16 (i / 8)
      const int d = i / 8 * 16 + i % 8;
      to[i] = uint8_t(code_of(x[d], r, levels) | code_of(x[d + 8], r, levels) << 4);
    }
  } else {
    for (int d = lane; d < dim; d += 32) to[d] = uint8_t(code_of(x[d], r, levels));
  }
  if (lane < 2)
    scales[page * p.scale_page_stride + (int64_t(head) * 2 + lane) * p.page + slot] =
        lane == 0 ? r.scale : r.zero;
}

__device__ __forceinline__ void append_row(const KvAppendArgs& a, int64_t token, int head,
                                           float* x) {
  const int lane = threadIdx.x % 32, dim = int(a.pages.dim), kv_heads = int(a.pages.kv_heads);
  const int q_heads = int(a.q_heads);
  const bool is_q = head < q_heads, is_k = !is_q && head < q_heads + kv_heads;
  const int h = is_q ? head : is_k ? head - q_heads : head - q_heads - kv_heads;
  const void* from = is_q ? a.q : is_k ? a.k : a.v;
  const int64_t at = token * (is_q ? a.q_stride : is_k ? a.k_stride : a.v_stride) + h * dim;

  const int b = sequence_at(a.batch.query_start, int(a.batch.batch), token);
  const int64_t index = int64_t(a.batch.kv_len[b]) - a.batch.query_start[b + 1] + token;
  const bool turn = a.rope && (is_q || is_k);
  const int half = turn ? a.rotary_dim / 2 : 0;
  const int64_t position = a.positions ? a.positions[token] : index;
  const bool has_angles = position >= 0 && position < a.rope_positions;
  const float* angles = a.rope + position * a.rotary_dim;
  for (int i = lane; i < half; i += 32) {
    const float u = load_float(from, a.type, at + i), v = load_float(from, a.type, at + half + i);
    const float cos = has_angles ? angles[i] : bits_float(0x7fc00000);
    const float sin = has_angles ? angles[half + i] : bits_float(0x7fc00000);
    x[i] = u * cos - v * sin, x[half + i] = v * cos + u * sin;
  }
  for (int d = 2 * half + lane; d < dim; d += 32) x[d] = load_float(from, a.type, at + d);
  warp_sync();
  if (is_q) {
    for (int d = lane; d < dim; d += 32)
      store_float(a.q_out, a.type, (token * a.q_heads + h) * dim + d, x[d]);
    return;
  }
  const KvPages& p = a.pages;
  if (index < 0 || index / p.page >= a.batch.table_stride) return;
  const int64_t page = a.batch.page_table[b * a.batch.table_stride + index / p.page];
  if (page < 0 || page >= p.pages) return;
  put_row(p, is_k ? p.k : p.v, is_k ? p.k_scale : p.v_scale, page, h, index % p.page, x);
}

// A warp per row; rows of a token side by side: q's heads, k's, v's.
__global__ void __launch_bounds__(32 * kAppendWarps) kv_append_kernel(const KvAppendArgs a) {
  const int64_t heads = a.q_heads + 2 * a.pages.kv_heads;
  const int64_t row = int64_t(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  dependency_launch();
  dependency_wait();
  if (row >= a.batch.tokens * heads) return;
  append_row(a, row / heads, int(row % heads),
             shared_memory<float>() + threadIdx.x / 32 * int(a.pages.dim));
}

inline cudaError_t launch_kv_append(const KvAppendArgs& args, cudaStream_t stream) {
  const int64_t rows = args.batch.tokens * (args.q_heads + 2 * args.pages.kv_heads);
  const int64_t blocks = (rows + kAppendWarps - 1) / kAppendWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(kv_append_kernel, dim3(unsigned(blocks)), dim3(32 * kAppendWarps),
                          kAppendWarps * size_t(args.pages.dim) * 4, stream, args);
}

}  // namespace qk
