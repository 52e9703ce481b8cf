// int8 quantization of activations where they are still in registers. The rule, bit for bit, of
// quantize_act:
//
//   amax = max |v|,  scale = amax / 127,  code = round half to even (v * (127 / amax)),  per group
//   of columns
//
// amax below 2^-100: scale and codes 0. A value that is infinite or NaN: scale NaN, codes 0.
// Every 16 codes have their sum beside them, which zero points multiply.
#pragma once
#include "../args.h"
#include "words.cuh"

namespace qk {

constexpr float kTinyAmax = 7.888609052210118e-31f;  // 2^-100: 127 / amax stays finite
constexpr float kLargestFloat = 3.402823466e38f;

// |v| as an integer: ordered like the values, infinity above the finite and NaN above infinity.
__device__ __forceinline__ int32_t magnitude(float v) { return float_bits(v) & 0x7fffffff; }

template <int kPer>
__device__ __forceinline__ int32_t largest(const float (&v)[kPer]) {
  int32_t most = 0;
#pragma unroll
  for (int j = 0; j < kPer; j++) most = magnitude(v[j]) > most ? magnitude(v[j]) : most;
  return most;
}

struct ActScale {
  float scale, inverse;  // inverse is 0 where all codes are
};
__device__ __forceinline__ ActScale act_scale_of(int32_t top /* the greatest magnitude */) {
  const float amax = bits_float(top);
  const bool used = amax >= kTinyAmax && amax <= kLargestFloat;
  if (used) return {amax / 127.f, 127.f / amax};
  return {amax < kTinyAmax ? 0.f : bits_float(0x7fc00000), 0.f};
}
__device__ __forceinline__ int quantize_code(float v, ActScale g) {
  return g.inverse == 0.f ? 0 : round_int(v * g.inverse);
}

// One piece of kPer consecutive columns, which are columns `at` on of all rows one behind the other
// (row * kx + column): their codes, and the sum beside every 16. Called by whole warps, in which
// the pieces of 16 columns lie in neighbouring lanes; `inside` is the same for those.
template <int kPer>
__device__ __forceinline__ void store_codes(const QuantActOut& out, int64_t at,
                                            const float (&v)[kPer], ActScale g, bool inside) {
  int sum = 0;
  uint32_t words[kPer / 4];
#pragma unroll
  for (int w = 0; w < kPer / 4; w++) {
    words[w] = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int code = quantize_code(v[4 * w + j], g);
      sum += code;
      words[w] |= uint32_t(uint8_t(code)) << (8 * j);
    }
  }
#pragma unroll
  for (int mask = 1; mask < 16 / kPer; mask *= 2) sum += shuffle_xor(sum, mask);
  if (!inside) return;
  if constexpr (kPer == 8) *reinterpret_cast<Words2*>(out.codes + at) = {{words[0], words[1]}};
  else *reinterpret_cast<uint32_t*>(out.codes + at) = words[0];
  if (at % 16 == 0) out.sums[at / 16] = int16_t(sum);
}

// The pieces of one row (see norm.cuh), v zero from the logical end on, as codes, scales and sums
// of row `row`. Called by all kLanes threads of the row. kx <= kLanes * kVectors * kPer.
template <int kLanes, int kVectors, int kPer>
__device__ __forceinline__ void quantize_pieces(const QuantActOut& out, int64_t row, int lane,
                                                const float (&v)[kVectors][kPer],
                                                int32_t* top /* [kx / 16] shared */) {
  auto sync = [] {
    if constexpr (kLanes > 32) block_sync();
    else warp_sync();
  };
  auto column = [&](int i) { return (i * kLanes + lane) * kPer; };
  const int kx = int(out.kx), groups = kx / out.group;
  for (int g = lane; g < groups; g += kLanes) top[g] = 0;
  sync();
  // 32 pieces side by side in one group are reduced first: their atomics would wait for each other.
  const bool warp_in_one_group = out.group % (32 * kPer) == 0;
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    int32_t most = largest(v[i]);
    if (warp_in_one_group) most = warp_max(most);
    const bool mine = column(i) < kx && (!warp_in_one_group || lane % 32 == 0);
    if (mine) shared_max(&top[column(i) / out.group], most);
  }
  sync();
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const bool inside =
        column(i) < kx;  // the 16 columns of a sum are inside together, as kx is a multiple of 16
    const ActScale g = act_scale_of(inside ? top[column(i) / out.group] : 0);
    store_codes<kPer>(out, row * out.kx + column(i), v[i], g, inside);
    if (inside && column(i) % out.group == 0)
      out.scale[row * groups + column(i) / out.group] = g.scale;
  }
}

// Group g of a row of any length and alignment by one warp: value(i) is computed twice, and is zero
// from the logical end on.
template <class F>
__device__ __forceinline__ void quantize_group(const QuantActOut& out, int64_t row, int64_t g,
                                               const F& value) {
  const int lane = threadIdx.x % 32;
  int32_t most = 0;
#pragma unroll 1
  for (int i = lane; i < out.group; i += 32) {
    const int32_t m = magnitude(value(g * out.group + i));
    most = m > most ? m : most;
  }
  const ActScale scale = act_scale_of(warp_max(most));
#pragma unroll 1
  for (int first = 0; first < out.group; first += 32) {
    const bool inside = first + lane < out.group;  // the last 16 lanes may be outside
    const int64_t i = g * out.group + first + lane;
    const int code = inside ? quantize_code(value(i), scale) : 0;
    int sum = code;
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) sum += shuffle_xor(sum, mask);
    if (!inside) continue;
    out.codes[row * out.kx + i] = int8_t(code);
    if (lane % 16 == 0) out.sums[(row * out.kx + i) / 16] = int16_t(sum);
  }
  if (lane == 0) out.scale[row * (out.kx / out.group) + g] = scale.scale;
}
// One row by a block: a warp per group.
template <int kThreads, class F>
__device__ __forceinline__ void quantize_row(const QuantActOut& out, int64_t row, const F& value) {
  const int64_t groups = out.kx / out.group;
  for (int64_t g = threadIdx.x / 32; g < groups; g += kThreads / 32)
    quantize_group(out, row, g, value);
}

}  // namespace qk
