// Rows to int8 codes, a scale per group and sums of 16 (quantize.cuh has the rule), for any source
// of the float32 values: quantize_act reads them, gate_quant computes them. Groups are numbered
// through all rows, group i being columns [i % G * group, ... + group) of row i / G with G = kx /
// group; codes, scales and sums are contiguous in that order.
//
// - quantize_groups_kernel: groups of up to 32 pieces of 16 bytes. A warp holds as many whole
// groups
//   as fit, and finds their maxima by shuffles; nothing is read twice and no thread waits for
//   another warp.
// - quantize_block_kernel: larger groups, up to 4,096 pieces: a block per group, the values in
//   registers.
// - quantize_any_kernel: rows that are not 16-byte aligned, and groups beyond: a warp per group,
//   which reads it twice.
//
// A block has 128 columns or more, so 2^31 blocks are more columns than any memory holds.
#pragma once
#include "../args.h"
#include "quantize.cuh"

namespace qk {

// Where values come from. kPer values are loaded at once, from columns that are all inside and
// 16-byte aligned; value() loads one from anywhere.
template <class T>
struct ActivationSource {
  static constexpr int kPer = 16 / sizeof(T);
  using Raw = Words4;
  const T* x;  // [M, K]
  int64_t k, x_stride;

  __device__ __forceinline__ Raw load(int64_t row, int64_t col) const {
    return load_stream(x + row * x_stride + col);
  }
  __device__ __forceinline__ void values(const Raw& raw, float (&v)[kPer]) const {
    unpack<T>(raw, v);
  }
  __device__ __forceinline__ float value(int64_t row, int64_t col) const {
    return widen(x[row * x_stride + col]);
  }
};

constexpr int kQuantizeThreads = 256;

template <class Source>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_groups_kernel(const Source source, const QuantActOut out, const int64_t count) {
  constexpr int kPer = Source::kPer;
  constexpr int kTurns = 2;  // of a warp, so that it has two loads on their way
  const int lane = threadIdx.x % 32, lanes = out.group / kPer, groups_of_warp = 32 / lanes;
  const int member = lane % lanes, mine = lane / lanes;  // the piece of the group, the group
  const int64_t warp = int64_t(blockIdx.x) * (kQuantizeThreads / 32) + threadIdx.x / 32;
  const int64_t row_groups = out.kx / out.group;

  auto group = [&](int turn) { return (warp * kTurns + turn) * groups_of_warp + mine; };
  auto inside = [&](int turn) { return mine < groups_of_warp && group(turn) < count; };
  typename Source::Raw raw[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    const int64_t row = group(turn) / row_groups;
    const int64_t col = (group(turn) - row * row_groups) * out.group + member * kPer;
    raw[turn] = {};
    if (inside(turn) && col < source.k) raw[turn] = source.load(row, col);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; turn++) {
    float v[kPer];
    source.values(raw[turn], v);
    int32_t most = largest(v);
    if ((lanes & (lanes - 1)) == 0) {
      for (int mask = 1; mask < lanes; mask *= 2) {
        const int32_t other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
    } else {
      const int32_t own = most;
      for (int l = 0; l < lanes; l++) {
        const int32_t other = shuffle(own, lane - member + l);
        most = other > most ? other : most;
      }
    }
    const ActScale g = act_scale_of(most);
    store_codes<kPer>(out, group(turn) * out.group + member * kPer, v, g, inside(turn));
    if (inside(turn) && member == 0) out.scale[group(turn)] = g.scale;
  }
}

constexpr int kQuantizeVectors = 4;         // pieces of a thread
constexpr int kQuantizeMostThreads = 1024;  // whose 65,536 registers are 64 each

template <class Source>
__global__ void __launch_bounds__(kQuantizeMostThreads)
    quantize_block_kernel(const Source source, const QuantActOut out) {
  constexpr int kPer = Source::kPer;
  auto* most_of_warp = shared_memory<int32_t>();  // [blockDim.x / 32]
  const int64_t group = blockIdx.x, row_groups = out.kx / out.group;
  const int64_t row = group / row_groups, begin = (group - row * row_groups) * out.group;
  auto column = [&](int i) { return int(i * blockDim.x + threadIdx.x) * kPer; };  // of the group

  float v[kQuantizeVectors][kPer];
  {
    typename Source::Raw raw[kQuantizeVectors];
#pragma unroll
    for (int i = 0; i < kQuantizeVectors; i++) {
      raw[i] = {};
      if (column(i) < out.group && begin + column(i) < source.k)
        raw[i] = source.load(row, begin + column(i));
    }
#pragma unroll
    for (int i = 0; i < kQuantizeVectors; i++) source.values(raw[i], v[i]);
  }
  int32_t most = 0;
#pragma unroll
  for (int i = 0; i < kQuantizeVectors; i++) most = largest(v[i]) > most ? largest(v[i]) : most;
  most = warp_max(most);
  if (threadIdx.x % 32 == 0) most_of_warp[threadIdx.x / 32] = most;
  block_sync();
  for (int w = 0; w < int(blockDim.x / 32); w++)
    most = most_of_warp[w] > most ? most_of_warp[w] : most;
  const ActScale g = act_scale_of(most);
#pragma unroll
  for (int i = 0; i < kQuantizeVectors; i++)
    store_codes<kPer>(out, group * out.group + column(i), v[i], g, column(i) < out.group);
  if (threadIdx.x == 0) out.scale[group] = g.scale;
}

template <class Source>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_any_kernel(const Source source, const QuantActOut out, const int64_t count) {
  const int64_t group = int64_t(blockIdx.x) * (kQuantizeThreads / 32) + threadIdx.x / 32;
  if (group >= count) return;  // a whole warp
  const int64_t row_groups = out.kx / out.group, row = group / row_groups;
  quantize_group(out, row, group - row * row_groups,
                 [&](int64_t i) { return i < source.k ? source.value(row, i) : 0.f; });
}

// `aligned`: every row of the source is 16-byte aligned, and k is a multiple of kPer.
template <class Source>
cudaError_t launch_quantize(const Source& source, const QuantActOut& out, int64_t m, bool aligned,
                            cudaStream_t stream) {
  constexpr int kPer = Source::kPer, kWarps = kQuantizeThreads / 32;
  const int64_t count = m * (out.kx / out.group);
  const int pieces = out.group / kPer;
  auto blocks = [](int64_t items, int64_t per_block) {
    return dim3(unsigned((items + per_block - 1) / per_block));
  };
  if (aligned && pieces <= 32)
    return launch(quantize_groups_kernel<Source>, blocks(count, 2 * kWarps * (32 / pieces)),
                  dim3(kQuantizeThreads), 0, stream, source, out, count);
  if (aligned && pieces <= kQuantizeVectors * kQuantizeMostThreads) {
    const unsigned warps = unsigned((pieces + 32 * kQuantizeVectors - 1) / (32 * kQuantizeVectors));
    return launch(quantize_block_kernel<Source>, dim3(unsigned(count)), dim3(32 * warps),
                  sizeof(int32_t) * warps, stream, source, out);
  }
  return launch(quantize_any_kernel<Source>, blocks(count, kWarps), dim3(kQuantizeThreads), 0,
                stream, source, out, count);
}

}  // namespace qk
