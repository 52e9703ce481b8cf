// RMSNorm and LayerNorm over rows v = x + residual: y = (v - mean) / sqrt(var + eps) * weight +
// bias, where RMSNorm has mean = 0. float32 inside; y leaves in x's type or as int8 codes. Sources
// of a row, its length and its output:
//
// - norm_registers_kernel: up to 16,384 columns, every row 16-byte aligned. Global memory is read
// once; the row stays
//   in registers between its two uses, cut into pieces of 16 bytes:
//
//     piece (i, lane) = columns [(i * kLanes + lane) * kPer, ... + kPer)      i < kVectors, kPer =
//     16 / sizeof(T)
//
//   A warp per row (8 rows in a block) up to 128 pieces, a block of 256 or 512 threads per row
//   beyond. weight and bias are float32, so twice the bytes of a 16-bit row; x goes past L1 to
//   leave them there.
// - norm_loop_kernel: any length and alignment, a block per row. Reads again for every use, from
// L2.
#pragma once
#include "../args.h"
#include "quantize.cuh"

namespace qk {

constexpr int kNormThreads = 256;

template <int kLanes>
constexpr int kNormBlock = kLanes > kNormThreads ? kLanes : kNormThreads;

// Of rows of kLanes threads: partial sums of one row per block, and the greatest magnitude of every
// group of up to kGroups per row where the output is quantized.
template <int kLanes, int kGroups = 0>
struct NormShared {
  float partial[2][kLanes / 32];
  int32_t top[kNormBlock<kLanes> / kLanes * kGroups];
};
template <int kLanes>
struct NormShared<kLanes, 0> {
  float partial[2][kLanes / 32];
};

// Sum over the kLanes threads of a row; every thread gets the same bits, whatever the schedule.
template <int kLanes>
__device__ __forceinline__ float row_sum(float v,
                                         float* partial /* [kLanes / 32], used by one sum only */) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  if constexpr (kLanes > 32) {
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    block_sync();
    v = 0;
#pragma unroll
    for (int w = 0; w < kLanes / 32; w++) v += partial[w];
  }
  return v;
}

// weight, bias [K] float32: the kPer values from `col` on
template <int kPer>
__device__ __forceinline__ void load_parameters(const float* p, int64_t col, float (&out)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; i += 4) {
    float four[4];
    unpack<float>(load_read_only(p + col + i), four);
#pragma unroll
    for (int j = 0; j < 4; j++) out[i + j] = four[j];
  }
}

template <class T, int kLanes, int kVectors, bool kQuantize>
__global__ void __launch_bounds__(kNormBlock<kLanes>) norm_registers_kernel(const NormArgs args) {
  constexpr int kPer = 16 / sizeof(T), kRows = kNormBlock<kLanes> / kLanes;
  constexpr int kGroups = kQuantize ? kLanes * kVectors * kPer / 16 : 0;  // at most, of a row
  auto& shared = *shared_memory<NormShared<kLanes, kGroups>>();
  const int lane = threadIdx.x % kLanes;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kLanes;
  if (row >= args.m)
    return;  // whole warps, and none that others wait for: a row of its own has no rest
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* residual =
      args.residual ? static_cast<const T*>(args.residual) + row * args.residual_stride : nullptr;
  auto column = [&](int i) { return int64_t(i * kLanes + lane) * kPer; };

  float v[kVectors][kPer];
  {
    Words4 raw[kVectors],
        added[kVectors];  // every load is on its way before the first is waited for
#pragma unroll
    for (int i = 0; i < kVectors; i++)
      raw[i] = column(i) < args.k ? load_stream(x + column(i)) : Words4{};
    if (residual) {
#pragma unroll
      for (int i = 0; i < kVectors; i++)
        added[i] = column(i) < args.k ? load_stream(residual + column(i)) : Words4{};
    }
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      unpack<T>(raw[i], v[i]);
      if (residual) {
        float r[kPer];
        unpack<T>(added[i], r);
#pragma unroll
        for (int j = 0; j < kPer; j++) v[i][j] += r[j];
        const Words4 sum = pack<T>(v[i]);
        unpack<T>(sum, v[i]);  // what is normalized is the sum as it is stored
        if (args.sum && column(i) < args.k)
          store_128(static_cast<T*>(args.sum) + row * args.k + column(i), sum);
      }
    }
  }

  float mean = 0;
  if (args.center) {
    float sum = 0;  // columns from K on are zero
#pragma unroll
    for (int i = 0; i < kVectors; i++)
#pragma unroll
      for (int j = 0; j < kPer; j++) sum += v[i][j];
    mean = row_sum<kLanes>(sum, shared.partial[0]) / float(args.k);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; i++)
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const float d = column(i) < args.k ? v[i][j] - mean : 0.f;
      squares += d * d;
    }
  const float scale =
      inverse_sqrt(row_sum<kLanes>(squares, shared.partial[1]) / float(args.k) + args.eps);

#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    if (column(i) >= args.k) continue;
    float weight[kPer], bias[kPer] = {};
    load_parameters<kPer>(args.weight, column(i), weight);
    if (args.bias) load_parameters<kPer>(args.bias, column(i), bias);
#pragma unroll
    for (int j = 0; j < kPer; j++) v[i][j] = (v[i][j] - mean) * scale * weight[j] + bias[j];
    if constexpr (!kQuantize)
      store_128(static_cast<T*>(args.y) + row * args.k + column(i), pack<T>(v[i]));
  }
  if constexpr (kQuantize) {
    quantize_pieces<kLanes, kVectors, kPer>(args.act, row, lane, v,
                                            shared.top + threadIdx.x / kLanes * kGroups);
  }
}

// A thread keeps to its columns, so that sum may be residual itself.
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_loop_kernel(const NormArgs args) {
  auto& shared = *shared_memory<NormShared<kNormThreads>>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* residual =
      args.residual ? static_cast<const T*>(args.residual) + row * args.residual_stride : nullptr;
  auto value = [&](int64_t i) {
    return residual ? widen(narrow<T>(widen(x[i]) + widen(residual[i]))) : widen(x[i]);
  };

  float mean = 0;
  if (args.center) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < args.k; i += kNormThreads) sum += value(i);
    mean = row_sum<kNormThreads>(sum, shared.partial[0]) / float(args.k);
  }
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.k; i += kNormThreads) {
    const float d = value(i) - mean;
    squares += d * d;
  }
  const float scale =
      inverse_sqrt(row_sum<kNormThreads>(squares, shared.partial[1]) / float(args.k) + args.eps);
  auto normal = [&](int64_t i) {
    return (value(i) - mean) * scale * args.weight[i] + (args.bias ? args.bias[i] : 0.f);
  };

  if (args.act.codes) {
    quantize_row<kNormThreads>(args.act, row,
                               [&](int64_t i) { return i < args.k ? normal(i) : 0.f; });
    block_sync();  // the residual is read above, and sum may be the residual
  }
  T* y = args.y ? static_cast<T*>(args.y) + row * args.k : nullptr;
  T* sum = args.sum ? static_cast<T*>(args.sum) + row * args.k : nullptr;
  for (int64_t i = threadIdx.x; i < args.k; i += kNormThreads) {
    const float v = value(i);
    if (y) y[i] = narrow<T>(normal(i));
    if (sum) sum[i] = narrow<T>(v);
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class T, bool kQuantize>
cudaError_t launch_norm_typed(const NormArgs& args, cudaStream_t stream) {
  constexpr int kPer = 16 / sizeof(T);
  auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool pointers_aligned = on_16(args.x) && on_16(args.residual) && on_16(args.y) &&
                                on_16(args.sum) && on_16(args.weight) && on_16(args.bias) &&
                                on_16(args.act.codes);
  const bool rows_aligned =
      args.k % kPer == 0 && args.x_stride % kPer == 0 && args.residual_stride % kPer == 0;
  const int64_t columns = kQuantize ? args.act.kx : args.k;
  const bool fits_registers = columns <= 16384;
  if (!pointers_aligned || !rows_aligned || !fits_registers)
    return launch(norm_loop_kernel<T>, dim3(unsigned(args.m)), dim3(kNormThreads),
                  sizeof(NormShared<kNormThreads>), stream, args);

  auto rows_of = [&](auto lanes_, auto vectors_) {
    constexpr int lanes = decltype(lanes_)::value, vectors = decltype(vectors_)::value;
    constexpr int threads = kNormBlock<lanes>, rows = threads / lanes;
    constexpr int groups = kQuantize ? lanes * vectors * kPer / 16 : 0;
    return launch(norm_registers_kernel<T, lanes, vectors, kQuantize>,
                  dim3(unsigned((args.m + rows - 1) / rows)), dim3(threads),
                  sizeof(NormShared<lanes, groups>), stream, args);
  };
  const int64_t pieces = columns / kPer;
  if (pieces <= 32) return rows_of(Constant<32>{}, Constant<1>{});
  if (pieces <= 64) return rows_of(Constant<32>{}, Constant<2>{});
  if (pieces <= 128) return rows_of(Constant<32>{}, Constant<4>{});
  if (pieces <= 256) return rows_of(Constant<256>{}, Constant<1>{});
  if (pieces <= 512) return rows_of(Constant<256>{}, Constant<2>{});
  if (pieces <= 1024) return rows_of(Constant<256>{}, Constant<4>{});
  if (pieces <= 2048) return rows_of(Constant<512>{}, Constant<4>{});
  if constexpr (kPer == 4) return rows_of(Constant<512>{}, Constant<8>{});
  return cudaErrorInvalidValue;  // not reached: 16,384 columns of 16 bits are 2,048 pieces
}

// y or act is written, not both.
inline cudaError_t launch_norm(const NormArgs& args, cudaStream_t stream) {
  if (args.m == 0) return cudaSuccess;
  auto typed = [&](auto zero) {
    using T = decltype(zero);
    return args.act.codes ? launch_norm_typed<T, true>(args, stream)
                          : launch_norm_typed<T, false>(args, stream);
  };
  switch (args.type) {
    case Dtype::f32: return typed(float{});
    case Dtype::f16: return typed(half_t{});
    case Dtype::bf16: return typed(bf16_t{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
