// What one warp does with 8 kN query rows and 16 keys at a time, the same for decode and prefill.
//
// Keys stand on the side of 16 of m16n8k16 and queries on that of 8, in both products, so that few
// queries (decode) waste little and a fragment of keys, once it is decoded, serves them all:
//
//   scores [16 keys, 8 rows] = K [16, D] Q^T [D, 8]       out^T [16 dims, 8 rows] += V^T P [16, 8]
//
// With g = lane / 4, t = lane % 4 a lane holds the scores of keys g, g + 8 and rows 2 t, 2 t + 1.
// Transposing 8x8 matrices turns them into the B fragment of the second product.
//
// Online softmax with a lazy reference: weights are 2^(score - reference), and the reference of a
// row is raised only when a score passes it by 14, to 6 below the greatest. So weights stay below
// 2^14 (float16 has 2^16), those of 2^-30 of the greatest still count, and for most keys neither
// the maximum is exchanged between lanes nor the sums are scaled.
//
// Codes of int8 and int4 pages enter the products as they are, less 128 or 8, exact in float16; for
// K' = K - offset and zero' = zero - offset
//   score = k_scale (q . K' - zero' sum(q)),    out = sum(p v_scale V') - sum(p v_scale zero')
// p v_scale is divided by `top`, a power of two above the v_scales so far, to stay in float16; the
// second sum takes the rounded products, so that the error of a weight is relative to |v|.
#pragma once
#include "attention_task.cuh"

namespace qk {

template <bool kFirst, class A, class B>
struct ConditionalOf {
  using type = A;
};
template <class A, class B>
struct ConditionalOf<false, A, B> {
  using type = B;
};
template <bool kFirst, class A, class B>
using Conditional = typename ConditionalOf<kFirst, A, B>::type;

// What the products are made in: pages of codes decode into float16.
template <KvType kKv>
using ProductType = Conditional<kKv == KvType::bf16, bf16_t, half_t>;

constexpr float kRaiseAbove = 14.f, kBelowGreatest = 6.f;

// Of kRows query rows of a block; a row is (token, head), the heads of one KV head side by side.
template <int kRows>
struct QueryRows {
  int first[kRows], last[kRows];  // keys seen; neither falls from row to row
  int token[kRows];               // within the sequence, or -1: no row
  int head[kRows];
  float factor[kRows];  // of q . k: scale * log2(e), and what q was scaled by
  float sum[kRows];     // of q, as it is multiplied
};

// One row of q [D] as kDim elements of C, zero from D on; called by a warp. put(dim, C). bfloat16
// goes into float16 times the power of two that brings the greatest to 2^13: what is below 2^-38
// of it is lost.
template <class C, int kDim, class Put>
__device__ __forceinline__ void stage_query(const AttentionTask& task, int64_t at, bool valid,
                                            float* factor, float* sum, const Put& put) {
  const int lane = threadIdx.x % 32;
  constexpr int kPer = (kDim + 31) / 32;
  float v[kPer];
  int32_t top = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    const int dim = lane + 32 * i;
    v[i] = valid && dim < task.dim ? load_float(task.q, task.type, at + dim) : 0.f;
    top = larger(top, float_bits(v[i]) & 0x7fffffff);
  }
  float up = 1.f, down = 1.f;
  if (__is_same(C, half_t) && task.type == Dtype::bf16) {
    const int exponent = warp_max(top) >> 23;        // biased by 127; 0 and 255 will do as they are
    const int shift = smaller(140 - exponent, 126);  // 13 - (exponent - 127); 2^-126 is a float
    up = bits_float((127 + shift) << 23), down = bits_float((127 - shift) << 23);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < kPer; i++) {
    const int dim = lane + 32 * i;
    const C element = narrow<C>(v[i] * up);
    total += widen(element);
    if (dim < kDim) put(dim, element);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (lane == 0) *factor = task.scale * kLog2E * down, *sum = total;
}

// Fills row r of a tile of rows: row `index` of the sequence's count * group. Rows beyond the last
// see what the last one sees, and are not stored.
template <class C, int kDim, int kRows, class Put>
__device__ __forceinline__ void stage_row(const AttentionTask& task, const Sequence& s, int kv_head,
                                          int64_t index, QueryRows<kRows>& rows, int r,
                                          const Put& put) {
  const bool valid = index < int64_t(s.count) * task.group;
  const int token = valid ? int(index / task.group) : s.count - 1;
  const int head = kv_head * task.group + int(index % task.group);
  stage_query<C, kDim>(task, (s.first_token + token) * task.q_stride + int64_t(head) * task.dim,
                       valid, &rows.factor[r], &rows.sum[r], put);
  if (threadIdx.x % 32 == 0) {
    const Seen seen = seen_keys(task, s, s.length - s.count + token);
    rows.first[r] = seen.first, rows.last[r] = seen.last;
    rows.token[r] = valid ? token : -1, rows.head[r] = head;
  }
}

// Of a lane's rows: 8 n + 2 t + c.
template <int kN>
struct Softmax {
  float reference[kN][2], total[kN][2];
  float zeros[kN][2];  // sum of weight * v_scale / top * zero' over this lane's keys
  float top, inverse_top;
  __device__ __forceinline__ Softmax() : top(0), inverse_top(0) {
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) reference[n][c] = kLowest, total[n][c] = 0, zeros[n][c] = 0;
  }
};
template <int kN>
struct Factors {
  float factor[kN][2], sum[kN][2];
  template <int kRows>
  __device__ __forceinline__ Factors(const QueryRows<kRows>& rows, int row0) {
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int r = row0 + 8 * n + 2 * (threadIdx.x % 4) + c;
        factor[n][c] = rows.factor[r], sum[n][c] = rows.sum[r];
      }
  }
};
// Of the keys 16 m + g + 8 i of a lane.
template <int kM>
struct KeyScales {
  float k[kM][2], k_zero[kM][2], v[kM][2], v_zero[kM][2];
};
// From the four planes [k_scale, k_zero, v_scale, v_zero][keys] fp16 in shared memory.
template <int kM>
__device__ __forceinline__ void load_scales(const uint16_t* planes, int keys, float offset,
                                            KeyScales<kM>& to) {
  auto at = [&](int plane, int key) {
    return widen(from_bits<half_t>(planes[plane * keys + key]));
  };
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int key = 16 * m + threadIdx.x % 32 / 4 + 8 * i;
      to.k[m][i] = at(0, key), to.k_zero[m][i] = at(1, key) - offset;
      to.v[m][i] = at(2, key), to.v_zero[m][i] = at(3, key) - offset;
    }
}

__device__ __forceinline__ float over_keys_max(float v) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) v = larger(v, shuffle_xor(v, mask));
  return v;
}
__device__ __forceinline__ float over_keys_sum(float v) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}

// Scores of 16 kM keys from `key` on -> the B fragments of their weights. `masked`: some of the
// keys are not seen by some row; bit m of `absent`: the keys of fragment m are not there.
template <class C, int kM, int kN, bool kCodes, int kRows, int kTiles>
__device__ __forceinline__ void weigh(const AttentionTask& task, const QueryRows<kRows>& rows,
                                      int row0, int64_t position0 /* of token 0 */, int key,
                                      bool masked, uint32_t absent, float (&s)[kM][kN][4],
                                      const Factors<kN>& factors, const KeyScales<kM>& scales,
                                      Softmax<kN>& softmax, float (&acc)[kTiles][kN][4],
                                      uint32_t (&weights)[kM][kN][2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float v = s[m][n][i];
        if constexpr (kCodes)
          v = fma(-scales.k_zero[m][i / 2], factors.sum[n][i % 2], v) * scales.k[m][i / 2];
        s[m][n][i] = v * factors.factor[n][i % 2];
      }
  if (bends(task)) {
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int r = row0 + 8 * n + 2 * t + c, head = rows.head[r];
        const int64_t position = position0 + rows.token[r];
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            s[m][n][2 * i + c] =
                bend_score(task, s[m][n][2 * i + c], head, key + 16 * m + 8 * i + g - position);
      }
  }
  if (masked) {
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int r = row0 + 8 * n + 2 * t + c;
        const int first = rows.first[r], last = rows.last[r];
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int at = key + 16 * m + 8 * i + g;
            const bool seen = at >= first && at < last && !(absent >> m & 1);
            if (!seen) s[m][n][2 * i + c] = bits_float(int32_t(0xff800000));  // -inf
          }
      }
  }

  bool raise = false;
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) raise |= s[m][n][i] > softmax.reference[n][i % 2] + kRaiseAbove;
    if constexpr (kCodes) raise |= scales.v[m][0] > softmax.top || scales.v[m][1] > softmax.top;
  }
  if (ballot(raise)) {
    float lift = 1.f;
    if constexpr (kCodes) {
      int32_t most = float_bits(softmax.top);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int i = 0; i < 2; i++)  // not NaN
          if (scales.v[m][i] > bits_float(most)) most = float_bits(scales.v[m][i]);
      const float top = bits_float((warp_max(most) + 0x007fffff) & 0x7f800000);  // 2^n, 2^n >= most
      softmax.inverse_top = top > 0 ? bits_float((254 << 23) - float_bits(top)) : 0.f;
      lift = softmax.top * softmax.inverse_top;
      softmax.top = top;
    }
#pragma unroll
    for (int n = 0; n < kN; n++) {
      float drop[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float most = kLowest;
#pragma unroll
        for (int m = 0; m < kM; m++)
          most = larger(s[m][n][c + 2], larger(s[m][n][c], most));  // a NaN is passed over
        most = larger(over_keys_max(most) - kBelowGreatest, softmax.reference[n][c]);
        drop[c] = exp2_approx(softmax.reference[n][c] - most);
        softmax.reference[n][c] = most;
        softmax.total[n][c] *= drop[c];
        drop[c] *= lift;
        softmax.zeros[n][c] *= drop[c];
      }
#pragma unroll
      for (int j = 0; j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[j][n][i] *= drop[i % 2];
    }
  }

#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float p[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float score = s[m][n][2 * i + c];
          p[c] = exp2_approx(score - softmax.reference[n][c]);
          softmax.total[n][c] += p[c];
          if constexpr (kCodes) {
            p[c] *= scales.v[m][i] * softmax.inverse_top;
            if (masked && score == bits_float(int32_t(0xff800000))) p[c] = 0;  // v_scale NaN
          }
        }
        const uint32_t pair = narrow_pair<C>(p[0], p[1]);
        if constexpr (kCodes) {
          softmax.zeros[n][0] =
              fma(widen(from_bits<C>(uint16_t(pair))), scales.v_zero[m][i], softmax.zeros[n][0]);
          softmax.zeros[n][1] = fma(widen(from_bits<C>(uint16_t(pair >> 16))), scales.v_zero[m][i],
                                    softmax.zeros[n][1]);
        }
        weights[m][n][i] = transpose_matrix(pair);
      }
}

// Two codes, one in the low byte of each half, as C - offset: magic is float16's 1024, into whose
// mantissa they are OR-ed.
__device__ __forceinline__ uint32_t code_pair(uint32_t bytes /* b1 b0 to the right */,
                                              uint32_t selector) {
  // 1 (1024 + q) - 1152 = q - 128
  return fma_pair<half_t>(select_bytes(bytes, 0x64646464u, selector), 0x3c003c00u, 0xe480e480u);
}
__device__ __forceinline__ uint32_t low_nibbles(uint32_t word) {
  // 1 (1024 + q) - 1032 = q - 8
  return fma_pair<half_t>(and_or(word, 0x000f000fu, 0x64006400u), 0x3c003c00u, 0xe408e408u);
}
__device__ __forceinline__ uint32_t high_nibbles(uint32_t word) {
  // (1024 + 16 q) / 16 - 72 = q - 8
  return fma_pair<half_t>(and_or(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
}

}  // namespace qk
