// RMSNorm and LayerNorm with an optional residual add: y = (v - mean) / sqrt(var + eps) * weight + bias over rows
// v = x + residual; RMSNorm has mean = 0. Statistics and arithmetic in float32.
//
// A row is cut into pieces of 16 bytes. Up to 8,192 columns they stay in registers between the two uses, so global
// memory is read once:
//
//   piece (i, lane) = columns [(i * kLanes + lane) * kPer, ... + kPer)      i < kVectors, kPer = 16 / sizeof(T)
//
// with a warp per row (8 rows per block) up to 128 pieces, and a block per row beyond. Longer rows, and rows whose
// addresses are not multiples of 16, are read again for every use; the later reads find them in L2.
// weight and bias are float32, hence twice the bytes of a 16-bit row, and come from L1 after a block's first row:
// x goes past L1 so as not to displace them.
#pragma once
#include "../args.h"
#include "ptx.cuh"

namespace qk {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;

// Sum over the kLanes threads of a row; every thread gets the same bits, whatever the schedule.
template <int kLanes>
__device__ __forceinline__ float row_sum(float v, float* partial /* [kNormWarps], used by one sum only */) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  if constexpr (kLanes > 32) {
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    block_sync();
    v = 0;
#pragma unroll
    for (int w = 0; w < kNormWarps; w++) v += partial[w];
  }
  return v;
}

// weight, bias [K] float32: the kPer values from `col` on
template <int kPer>
__device__ __forceinline__ void load_parameters(const float* p, int64_t col, float (&out)[kPer]) {
#pragma unroll
  for (int i = 0; i < kPer; i += 4) {
    float four[4];
    unpack<float>(load_shared_input(p + col + i), four);
#pragma unroll
    for (int j = 0; j < 4; j++) out[i + j] = four[j];
  }
}

template <class T, int kLanes, int kVectors>
__global__ void __launch_bounds__(kNormThreads) norm_registers_kernel(const NormArgs args) {
  constexpr int kPer = 16 / sizeof(T);
  __shared__ float partial[2][kNormWarps];
  const int lane = threadIdx.x % kLanes;
  const int64_t row = int64_t(blockIdx.x) * (kNormThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= args.m) return;  // whole warps, and never one that others wait for: with a block per row there is no rest
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * args.residual_stride : nullptr;
  auto column = [&](int i) { return int64_t(i * kLanes + lane) * kPer; };

  float v[kVectors][kPer];
  {
    Words4 raw[kVectors], added[kVectors];  // every load is on its way before the first is waited for
#pragma unroll
    for (int i = 0; i < kVectors; i++) raw[i] = column(i) < args.k ? load_stream(x + column(i)) : Words4{};
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
        if (args.sum && column(i) < args.k)
          store_128(static_cast<T*>(args.sum) + row * args.k + column(i), pack<T>(v[i]));
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
    mean = row_sum<kLanes>(sum, partial[0]) / float(args.k);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; i++)
#pragma unroll
    for (int j = 0; j < kPer; j++) {
      const float d = column(i) < args.k ? v[i][j] - mean : 0.f;
      squares += d * d;
    }
  const float scale = inverse_sqrt(row_sum<kLanes>(squares, partial[1]) / float(args.k) + args.eps);

#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    if (column(i) >= args.k) continue;
    float weight[kPer], bias[kPer] = {};
    load_parameters<kPer>(args.weight, column(i), weight);
    if (args.bias) load_parameters<kPer>(args.bias, column(i), bias);
#pragma unroll
    for (int j = 0; j < kPer; j++) v[i][j] = (v[i][j] - mean) * scale * weight[j] + bias[j];
    store_128(static_cast<T*>(args.y) + row * args.k + column(i), pack<T>(v[i]));
  }
}

// Any length and alignment, a block per row. A thread keeps to its columns, so that sum may be residual itself.
template <class T>
__global__ void __launch_bounds__(kNormThreads) norm_loop_kernel(const NormArgs args) {
  __shared__ float partial[2][kNormWarps];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + row * args.residual_stride : nullptr;
  auto value = [&](int64_t i) { return widen(x[i]) + (residual ? widen(residual[i]) : 0.f); };

  float mean = 0;
  if (args.center) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < args.k; i += kNormThreads) sum += value(i);
    mean = row_sum<kNormThreads>(sum, partial[0]) / float(args.k);
  }
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.k; i += kNormThreads) {
    const float d = value(i) - mean;
    squares += d * d;
  }
  const float scale = inverse_sqrt(row_sum<kNormThreads>(squares, partial[1]) / float(args.k) + args.eps);

  T* y = static_cast<T*>(args.y) + row * args.k;
  T* sum = args.sum ? static_cast<T*>(args.sum) + row * args.k : nullptr;
  for (int64_t i = threadIdx.x; i < args.k; i += kNormThreads) {
    const float v = value(i);
    if (sum) sum[i] = narrow<T>(v);
    y[i] = narrow<T>((v - mean) * scale * args.weight[i] + (args.bias ? args.bias[i] : 0.f));
  }
}

template <class T>
cudaError_t launch_norm_typed(const NormArgs& args, cudaStream_t stream) {
  constexpr int kPer = 16 / sizeof(T);
  auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool pointers_aligned = on_16(args.x) && on_16(args.residual) && on_16(args.y) && on_16(args.sum) &&
                                on_16(args.weight) && on_16(args.bias);
  const bool rows_aligned = args.k % kPer == 0 && args.x_stride % kPer == 0 && args.residual_stride % kPer == 0;
  const int64_t pieces = args.k / kPer;
  const bool fits_registers = args.k <= 8192;
  if (!pointers_aligned || !rows_aligned || !fits_registers)
    return launch(norm_loop_kernel<T>, dim3(unsigned(args.m)), dim3(kNormThreads), 0, stream, args);

  auto rows_of = [&](auto kernel, int rows_per_block) {
    const dim3 grid(unsigned((args.m + rows_per_block - 1) / rows_per_block));
    return launch(kernel, grid, dim3(kNormThreads), 0, stream, args);
  };
  if (pieces <= 32) return rows_of(norm_registers_kernel<T, 32, 1>, kNormWarps);
  if (pieces <= 64) return rows_of(norm_registers_kernel<T, 32, 2>, kNormWarps);
  if (pieces <= 128) return rows_of(norm_registers_kernel<T, 32, 4>, kNormWarps);
  if (pieces <= 256) return rows_of(norm_registers_kernel<T, kNormThreads, 1>, 1);
  if (pieces <= 512) return rows_of(norm_registers_kernel<T, kNormThreads, 2>, 1);
  if (pieces <= 1024) return rows_of(norm_registers_kernel<T, kNormThreads, 4>, 1);
  if constexpr (kPer == 4) return rows_of(norm_registers_kernel<T, kNormThreads, 8>, 1);
  return cudaErrorInvalidValue;  // not reached: 8,192 columns are 1,024 pieces of 16-bit elements
}

inline cudaError_t launch_norm(const NormArgs& args, cudaStream_t stream) {
  if (args.m == 0) return cudaSuccess;
  switch (args.type) {
    case Dtype::f32: return launch_norm_typed<float>(args, stream);
    case Dtype::f16: return launch_norm_typed<__half>(args, stream);
    case Dtype::bf16: return launch_norm_typed<__nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
