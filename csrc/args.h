// Torch-free argument structs: what a kernel is told. Filled by check.h from tensors, read by every
// backend. Shapes are in the comments; all arrays are contiguous unless a stride stands beside
// them.
#pragma once
#include <cstdint>

namespace qk {

enum class Dtype : int32_t { f32, f16, bf16 };

// What `code` means once its group is known: w = scale * (code - zero) or scale * code - minimum.
enum class Zero : int32_t {
  symmetric,  // zero is 2^(bits - 1), or 0 when there is a table
  integer,    // zero: [Nb, Kp/G, 64] uint8
  minimum,    // zero: [Nb, Kp/G, 64], the scale's own kind; two-level: minimum = block_zero * zero
};
enum class Scale : int32_t {
  f32,  // flat, the type of `scale` (and of minima)
  f16,
  bf16,
  e8m0,
  e4m3,
  two_level,   // scale: int8, times block_scale (fp16 of 256 columns); minima: int8, times
               // block_zero
  two_nibble,  // scale: uint8, low nibble the scale, high nibble the minimum (Q2_K); block_scale,
               // block_zero as above
};
// Bytes of a stored scale; minima have the same.
constexpr int scale_size(Scale kind) {
  return kind == Scale::f32 ? 4 : kind == Scale::f16 || kind == Scale::bf16 ? 2 : 1;
}

struct Weight {
  const uint8_t* codes;         // [Nb, Kp/16, 128 * bits] bytes, see layout.h; Nb = ceil(N / 64)
  const void* scale;            // [Nb, Kp/G, 64]
  const void* zero;             // [Nb, Kp/G, 64] or null
  const uint16_t* block_scale;  // [Nb, Kp/256, 64] fp16 or null
  const uint16_t* block_zero;   // [Nb, Kp/256, 64] fp16 or null
  const int8_t* table;          // [16] or null
  int64_t n, k, kp;             // logical rows and columns; padded columns
  int bits, group;              // group: columns per scale, a multiple of 16
  Scale scale_kind;
  Zero zero_kind;
};

// Activations quantized at run time: x ~= scale * codes.
struct QuantAct {
  const int8_t* codes;  // [M, Kx], |code| <= 127, zero from the logical K on
  const float* scale;   // [M, Kx / group]
  const int16_t* sums;  // [M, Kx / 16], sums of 16 codes
  int64_t kx;           // row length of codes: K rounded up to a multiple of group, >= 16
  int group;            // columns per scale: a multiple of 16
};
struct QuantActOut {
  int8_t* codes;
  float* scale;
  int16_t* sums;
  int64_t kx;
  int group;
};

struct QuantizeActArgs {
  const void* x;  // [M, K]
  Dtype x_type;
  int64_t m, k, x_stride;  // x_stride: elements between rows
  QuantActOut out;
};

struct LinearArgs {
  Weight w;
  const void* x;  // [M, K] for float activations, else null
  Dtype x_type;
  int64_t x_stride;
  QuantAct act;          // for int8 activations (x is null)
  const void* bias;      // [N] float32 or null
  const void* residual;  // [M, N] of y_type or null; y = round(sum + bias + residual), all float32
  int64_t residual_stride;
  void* y;  // [M, N]
  Dtype y_type;
  int64_t m, y_stride;
  bool own_rows;         // CPU: every thread computes the rows of its static share and no others
  bool weights_settled;  // CUDA: no kernel or copy that may still run writes them
};

struct UnpackArgs {  // codes [N, K] uint8 <-> packed; dequantize: out [N, K] of out_type
  Weight w;
  void* out;
  Dtype out_type;
};
struct PackArgs {
  const uint8_t* codes;  // [N, K]
  uint8_t* packed;       // [Nb, Kp/16, 128 * bits], wholly overwritten
  int64_t n, k, kp;
  int bits;
  uint32_t* seen;  // [1], zero before: the OR of all codes in each byte; bits beyond `bits` are
                   // dropped from packed
};
struct EmbeddingArgs {
  const int64_t* ids;  // [T], all in [0, N)
  Weight w;            // the table, [N, K]
  void* y;             // [T, K]
  Dtype y_type;
  int64_t t;
  float multiplier;  // applied after dequantizing
};

struct NormArgs {
  const void* x;         // [M, K]
  const void* residual;  // [M, K], added to x first, or null; with it comes sum
  const float* weight;   // [K]
  const float* bias;     // [K] or null
  Dtype type;            // of x, residual, y and sum
  int64_t m, k;
  int64_t x_stride, residual_stride;
  float eps;
  bool center;      // LayerNorm: subtract the mean
  void* y;          // [M, K] or null when quantized
  void* sum;        // [M, K], x + residual, or null; may be residual itself
  QuantActOut act;  // act.codes is null when y is wanted
};

enum class Activation : int32_t { silu, gelu_tanh, gelu_erf, relu };
struct GateArgs {
  const void* gate;  // [M, K]
  const void* up;    // [M, K], or null: y = activation(gate)
  Dtype type;
  int64_t m, k, gate_stride, up_stride;
  Activation activation;
  void* y;  // [M, K] or null when quantized
  QuantActOut act;
};

// Pages of a KV cache. int8: uint8 codes and x = scale * (code - zero); int4: two codes per byte,
// byte i of a run of 8 holding dims 16 c + i (low nibble) and 16 c + 8 + i (high) of its chunk c.
enum class KvType : int32_t { f32, f16, bf16, int8, int4 };
struct KvPages {
  void* k;  // [P, Hkv, page, D] (int4: D / 2 bytes)
  void* v;
  uint16_t* k_scale;  // [P, Hkv, 2, page] fp16: plane 0 the scale, plane 1 the zero point; null for
                      // floats
  uint16_t* v_scale;
  KvType type;
  int64_t pages, kv_heads, page, dim;
  int64_t page_stride;        // elements (int4: bytes) between pages of k and v
  int64_t scale_page_stride;  // elements between pages of k_scale and v_scale
};
// A ragged batch: tokens query_start[b] .. query_start[b + 1] belong to sequence b and are its last
// ones; their positions are kv_len[b] - count + i, where kv_len counts them too.
struct Ragged {
  const int32_t* query_start;  // [B + 1]
  const int32_t* kv_len;       // [B]
  const int32_t* page_table;   // [B, table_stride]
  int64_t batch, tokens, table_stride;
};

struct KvAppendArgs {
  const void* q;                         // [T, Hq, D]
  const void* k;                         // [T, Hkv, D]
  const void* v;                         // [T, Hkv, D]
  void* q_out;                           // [T, Hq, D]
  Dtype type;                            // of q, k, v and q_out
  int64_t q_stride, k_stride, v_stride;  // elements between tokens
  int64_t q_heads;
  const float*
      rope;  // [positions, rotary_dim]: cos of rotary_dim / 2 angles, then sin; null: no rotation
  int64_t rope_positions;
  int rotary_dim;            // even, <= D; rotate-half pairs (i, i + rotary_dim / 2)
  const int32_t* positions;  // [T] or null: from the batch
  KvPages pages;
  Ragged batch;
};

// What a score takes beyond scale * q . k, all float32 and by query head; softcap comes before.
struct ScoreBias {
  const float* sinks;          // [Hq] or null: the score of one more key, which has no value
  const float* alibi_slopes;   // [Hq] or null: the score loses slope * |query - key| (positions)
  const float* distance_bias;  // [Hq, 2 reach + 1] or null: the score gains the entry at
                               // clamp(key - query, -reach, reach) + reach (T5's buckets, expanded)
  int64_t reach;
};

struct AttentionArgs {
  const void* q;  // [T, Hq, D]
  void* out;      // [T, Hq, D]
  Dtype type;
  int64_t q_stride, q_heads;
  float scale;  // of q . k
  bool causal;
  int64_t window;  // > 0: a query sees the last `window` positions, itself included
  float softcap;   // > 0: softcap * tanh(score / softcap)
  ScoreBias bias;
  KvPages pages;
  Ragged batch;
};
// Without a cache: k and v are [Tk, Hkv, D], sequence b owns kv_start[b] .. kv_start[b + 1].
struct DenseAttentionArgs {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  Dtype type;
  int64_t q_stride, k_stride, v_stride, q_heads, kv_heads, dim, batch, tokens;
  int64_t keys;                // Tk
  const int32_t* query_start;  // [B + 1]
  const int32_t* kv_start;     // [B + 1]
  float scale;
  bool causal;  // aligned at the end: query i of n sees keys up to len - n + i
  int64_t window;
  float softcap;
  ScoreBias bias;
};

constexpr int64_t kSampleNan = -1;    // a logit is NaN
constexpr int64_t kSampleEmpty = -2;  // every logit is -inf
struct SampleArgs {
  const float* logits;       // [B, V]
  int64_t logits_stride;     // elements between rows
  const float* temperature;  // [B]; 0: greedy
  const int32_t* top_k;      // [B]; 0: off
  const float* top_p;        // [B]; 1: off
  const float* min_p;        // [B]; 0: off
  const int64_t* seed;       // [B]
  const int64_t* offset;     // [B], the index of the draw
  int64_t* out;              // [B]: the token, or kSampleNan, kSampleEmpty
  int64_t batch, vocab;
};

}  // namespace qk
