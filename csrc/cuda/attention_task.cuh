// What the attention kernels are told: one struct for keys in pages and keys that lie densely, and
// what a sequence and a key's row are in it.
//
// Indices come from device memory, unchecked. Whatever they hold, nothing is read out of bounds:
// tokens are taken within [0, T], keys within the width of the page table (or the dense keys), and
// a key whose page is out of range counts as not there. Tokens that no sequence owns keep
// unspecified values.
#pragma once
#include "../args.h"
#include "ptx.cuh"

namespace qk {

constexpr float kLog2E = 1.4426950408889634f;  // scores are kept times this, for exp2
constexpr float kLowest = -3.402823466e38f;

struct AttentionTask {
  const void* q;  // [T, Hq, D], tokens q_stride elements apart
  void* out;      // [T, Hq, D]
  Dtype type;
  int64_t q_stride;
  int q_heads, kv_heads, group, dim;  // group = q_heads / kv_heads
  float scale, softcap;
  bool causal;
  int64_t window;
  ScoreBias bias;
  // Row `slot` of head h of page p, all in bytes: p * page_stride + h * head_stride + slot * k_row.
  // Dense keys are one page without end.
  const uint8_t *k, *v;
  KvType kv;
  int64_t page_stride, head_stride;
  int k_row, v_row;
  const uint16_t *k_scale, *v_scale;  // [P, Hkv, 2, page] fp16
  int64_t scale_page_stride;          // elements
  const int32_t* page_table;          // [B, table_stride], or null: dense keys
  int64_t table_stride, pages;
  int page;
  const int32_t *query_start, *kv_len;  // [B + 1], [B]
  const int32_t* kv_start;              // [B + 1] of dense keys
  int batch;
  int64_t tokens;
  int64_t most_keys;  // of a sequence: what the table has room for, or all dense keys
  // Which sequences a kernel takes: those of at least `least_new` and at most `most_new` tokens.
  int least_new, most_new;
};

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

struct Sequence {
  int64_t first_token, first_key;  // first_key: of dense keys
  int count;                       // tokens
  int64_t length;                  // keys, as the positions count them
  int present;                     // of these, those there is room for
};
__device__ __forceinline__ Sequence sequence_of(const AttentionTask& task, int b) {
  Sequence s;
  s.first_token = smaller(larger(int64_t(task.query_start[b]), int64_t(0)), task.tokens);
  const int64_t end = smaller(larger(int64_t(task.query_start[b + 1]), s.first_token), task.tokens);
  s.count = int(end - s.first_token);
  s.first_key = 0;
  if (task.page_table) {
    s.length = task.kv_len[b];
    s.present = int(larger(int64_t(0), smaller(s.length, task.most_keys)));
  } else {
    s.first_key = smaller(larger(int64_t(task.kv_start[b]), int64_t(0)), task.most_keys);
    s.length =
        smaller(larger(int64_t(task.kv_start[b + 1]), s.first_key), task.most_keys) - s.first_key;
    s.present = int(s.length);
  }
  return s;
}
// The sequence of a token: the last one that starts at or before it.
__device__ __forceinline__ int sequence_at(const int32_t* query_start /* [batch + 1] */, int batch,
                                           int64_t token) {
  int low = 0, high = batch;  // low starts at or before the token, high after it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (query_start[middle] <= token) low = middle;
    else high = middle;
  }
  return low;
}
__device__ __forceinline__ bool takes(const AttentionTask& task, const Sequence& s) {
  return s.count >= task.least_new && s.count <= task.most_new;
}

// Keys of one sequence and KV head: where 16 of them, from a multiple of 16 on, lie.
struct KeyRun {
  int page, slot;  // page < 0: not there
};
__device__ __forceinline__ KeyRun key_run(const AttentionTask& task, const Sequence& s, int b,
                                          int key) {
  if (!task.page_table) return {0, int(s.first_key) + key};
  const int32_t page = task.page_table[b * task.table_stride + key / task.page];
  return {page >= 0 && page < task.pages ? page : -1, key % task.page};
}
__device__ __forceinline__ const uint8_t* k_rows(const AttentionTask& task, int head, KeyRun run) {
  return task.k + int64_t(run.page) * task.page_stride + head * task.head_stride +
         run.slot * int64_t(task.k_row);
}
__device__ __forceinline__ const uint8_t* v_rows(const AttentionTask& task, int head, KeyRun run) {
  return task.v + int64_t(run.page) * task.page_stride + head * task.head_stride +
         run.slot * int64_t(task.v_row);
}

// The keys [first, last) that a query at this position sees.
struct Seen {
  int first, last;
};
__device__ __forceinline__ Seen seen_keys(const AttentionTask& task, const Sequence& s,
                                          int64_t position) {
  Seen seen{0, s.present};
  if (task.causal) seen.last = int(larger(int64_t(0), smaller(position + 1, int64_t(s.present))));
  if (task.window > 0)
    seen.first = int(larger(int64_t(0), smaller(position - task.window + 1, int64_t(s.present))));
  return seen;
}

// Element i of an array of this type.
__device__ __forceinline__ float load_float(const void* p, Dtype type, int64_t i) {
  if (type == Dtype::f32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return type == Dtype::f16 ? widen(from_bits<half_t>(bits)) : widen(from_bits<bf16_t>(bits));
}
__device__ __forceinline__ void store_float(void* p, Dtype type, int64_t i, float v) {
  if (type == Dtype::f32) static_cast<float*>(p)[i] = v;
  else
    static_cast<uint16_t*>(p)[i] =
        type == Dtype::f16 ? to_bits(narrow<half_t>(v)) : to_bits(narrow<bf16_t>(v));
}

// What softcap, ALiBi and the bias by distance make of a score. All scores are times log2(e).
__device__ __forceinline__ float bend_score(const AttentionTask& task, float s, int head,
                                            int64_t distance /* key - position */) {
  if (task.softcap > 0) {
    // tanh |x| = (1 - t) / (1 + t) with t = e^(-2 |x|); the sign is put back.
    const float cap = task.softcap * kLog2E, x = s / cap;
    const float t = exp2_approx((x < 0 ? x : -x) * (2 * kLog2E));
    const float y = (1.f - t) * reciprocal_approx(1.f + t);
    s = cap * (x < 0 ? -y : y);
  }
  if (task.bias.alibi_slopes)
    s -= task.bias.alibi_slopes[head] * float(distance < 0 ? -distance : distance) * kLog2E;
  if (task.bias.distance_bias) {
    const int64_t reach = task.bias.reach;
    const int64_t at = smaller(larger(distance, -reach), reach) + reach;
    s += task.bias.distance_bias[head * (2 * reach + 1) + at] * kLog2E;
  }
  return s;
}
__device__ __forceinline__ bool bends(const AttentionTask& task) {
  return task.softcap > 0 || task.bias.alibi_slopes || task.bias.distance_bias;
}

// The score of the sink, a key that has no value.
__device__ __forceinline__ float sink_score(const AttentionTask& task, int head) {
  return task.bias.sinks ? task.bias.sinks[head] * kLog2E : bits_float(int32_t(0xff800000));
}

inline int kv_bits(KvType type) {
  return type == KvType::f32 ? 32 : type == KvType::int8 ? 8 : type == KvType::int4 ? 4 : 16;
}
inline AttentionTask attention_task(const AttentionArgs& a) {
  AttentionTask t{};
  t.q = a.q, t.out = a.out, t.type = a.type, t.q_stride = a.q_stride;
  t.q_heads = int(a.q_heads), t.kv_heads = int(a.pages.kv_heads), t.dim = int(a.pages.dim);
  t.group = t.q_heads / t.kv_heads;
  t.scale = a.scale, t.softcap = a.softcap, t.causal = a.causal, t.window = a.window;
  t.bias = a.bias;
  t.k = static_cast<const uint8_t*>(a.pages.k), t.v = static_cast<const uint8_t*>(a.pages.v);
  t.kv = a.pages.type, t.page = int(a.pages.page), t.pages = a.pages.pages;
  const int bits = kv_bits(t.kv);
  t.k_row = t.v_row = int(a.pages.dim * bits / 8);
  t.head_stride = a.pages.page * int64_t(t.k_row);
  t.page_stride = a.pages.page_stride * (bits < 8 ? 8 : bits) / 8;
  t.k_scale = a.pages.k_scale, t.v_scale = a.pages.v_scale;
  t.scale_page_stride = a.pages.scale_page_stride;
  t.page_table = a.batch.page_table, t.table_stride = a.batch.table_stride;
  t.query_start = a.batch.query_start, t.kv_len = a.batch.kv_len;
  t.batch = int(a.batch.batch), t.tokens = a.batch.tokens;
  t.most_keys = a.batch.table_stride * a.pages.page;
  t.least_new = 0, t.most_new = INT32_MAX;
  return t;
}
inline AttentionTask attention_task(const DenseAttentionArgs& a) {
  AttentionTask t{};
  t.q = a.q, t.out = a.out, t.type = a.type, t.q_stride = a.q_stride;
  t.q_heads = int(a.q_heads), t.kv_heads = int(a.kv_heads), t.dim = int(a.dim);
  t.group = t.q_heads / t.kv_heads;
  t.scale = a.scale, t.softcap = a.softcap, t.causal = a.causal, t.window = a.window;
  t.bias = a.bias;
  t.k = static_cast<const uint8_t*>(a.k), t.v = static_cast<const uint8_t*>(a.v);
  t.kv = a.type == Dtype::f32 ? KvType::f32 : a.type == Dtype::f16 ? KvType::f16 : KvType::bf16;
  const int64_t size = kv_bits(t.kv) / 8;
  t.k_row = int(a.k_stride * size), t.v_row = int(a.v_stride * size), t.head_stride = a.dim * size;
  t.query_start = a.query_start, t.kv_start = a.kv_start;
  t.batch = int(a.batch), t.tokens = a.tokens, t.most_keys = a.keys;
  t.least_new = 0, t.most_new = INT32_MAX;
  return t;
}

}  // namespace qk
