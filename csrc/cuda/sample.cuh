// One token per row of logits, bit for bit the one that cpu/isa/sample.cpp and the reference draw;
// the rules stand in the former. A block of 1,024 threads per row, which reads it from L2 in 2 to 8
// passes: the largest logit (all that greedy needs), two per filter (four where the logits of a bin
// are too many to list), and the weights.
//
// A filter keeps a logit while the mass above it stays below a limit. The smallest logit kept is
// found from a histogram of the mass over 2,048 equal steps of (max - logit), in which neighbours
// rarely meet, then by 11 bits of the key at a time among the logits of one step, which are listed
// in shared memory. All masses are integers, so that no sum depends on its order.
#pragma once
#include "../args.h"
#include "ptx.cuh"

namespace qk {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr int kSampleBins = 2048;  // 11 bits of a key; two of every thread
constexpr int kSampleList = 4096;
constexpr float kLowestExponent = -29.f;  // exp(-29) < 2^-41: its weight rounds to 0

// Where a filter's search is: by equal steps, then three times by 11 bits of the key.
struct SampleSearch {
  int32_t listed;  // logits that came to the list; beyond kSampleList they are not kept
  struct {
    int32_t place;  // of the bin that reaches the limit, -1: none does
    uint64_t above;
  } found[4];
};
struct SampleShared {
  uint32_t low[kSampleBins], high[kSampleBins];  // the masses of the bins
  float list[kSampleList];                       // logits of one bin
  SampleSearch search[2];                        // of top-k and top-p
  uint64_t best[kSampleWarps], least[kSampleWarps], scan[kSampleWarps], sums[kSampleWarps];
};

struct SampleRow {
  const float* logits;  // [V]
  int vocab;
  float max, temperature;
  float steps;  // bins per unit of (max - logit)
  bool weighs;  // what lies beyond the bins has weight 0
};

// Unsigned integers in the order of the floats, -0 equal to 0.
__device__ __forceinline__ uint32_t key_of(float v) {
  const int32_t bits = float_bits(v + 0.f);
  return uint32_t(bits ^ (bits >> 31 | INT32_MIN));
}
__device__ __forceinline__ float key_value(uint32_t key) {
  return bits_float(int32_t(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)));
}

// Calls f(column, logit) for the columns first, first + step .. below end; eight loads at a time
// are on their way.
template <class F>
__device__ __forceinline__ void each_logit(const SampleRow& row, int first, int end, int step,
                                           const F& f) {
  constexpr int kLoads = 8;
  for (int at = first; at < end; at += kLoads * step) {
    float l[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) l[i] = at + i * step < end ? row.logits[at + i * step] : 0.f;
#pragma unroll
    for (int i = 0; i < kLoads; i++)
      if (at + i * step < end) f(at + i * step, l[i]);
  }
}
template <class F>
__device__ __forceinline__ void each_logit(const SampleRow& row, const F& f) {
  each_logit(row, int(threadIdx.x), row.vocab, kSampleThreads, f);
}

// e of the rules, by float32 operations that are not fused.
__device__ __forceinline__ float weight_exp(const SampleRow& row, float l) {
  const float d = l == row.max ? 0.f : (l - row.max) / row.temperature;
  const float x = d > kLowestExponent ? d : kLowestExponent;
  const int n = round_int(x * 1.44269504f);
  float r = x - float(n) * 0.693145751953125f;  // ln 2 to 16 bits: the product is exact
  r = r - float(n) * 1.42860677e-6f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const float e = p * bits_float(int32_t(uint32_t(n + 127) << 23));
  return d < kLowestExponent ? 0.f : e;
}
// round(e * 2^40); the product is exact.
__device__ __forceinline__ uint64_t weight_of(float e) {
  return uint64_t(round_int64(e * 1099511627776.f));
}

// The first two words of Philox4x32-10.
__device__ __forceinline__ uint64_t philox(int64_t seed, int64_t offset) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
  uint32_t c0 = uint32_t(offset), c1 = uint32_t(uint64_t(offset) >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(c0) * 0xd2511f53u, b = uint64_t(c2) * 0xcd9e8d57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
  return uint64_t(c1) << 32 | c0;
}

__device__ __forceinline__ uint64_t warp_largest(uint64_t v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint64_t other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}
// The sum of v over the lanes up to this one.
__device__ __forceinline__ uint64_t warp_scan(uint64_t v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = shuffle(v, lane - step);
    if (lane >= step) v += other;
  }
  return v;
}
// The largest v of the block; each call has `of_warp` [kSampleWarps] to itself.
__device__ __forceinline__ uint64_t block_largest(uint64_t v, uint64_t* of_warp) {
  v = warp_largest(v);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  block_sync();
  return warp_largest(of_warp[threadIdx.x % 32]);
}
// The sum of v over the threads before this one, and over all.
struct Scan {
  uint64_t before, total;
};
__device__ __forceinline__ Scan block_scan(uint64_t v, uint64_t* of_warp) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t sum = warp_scan(v);
  if (lane == 31) of_warp[warp] = sum;
  block_sync();
  const uint64_t warps = warp_scan(of_warp[lane]);
  return {shuffle(warps, warp) - of_warp[warp] + sum - v, shuffle(warps, 31)};
}

// Which of the steps of (max - logit) l is in; the last one has all that is beyond.
__device__ __forceinline__ int step_of(const SampleRow& row, float l) {
  const float steps = (row.max - l) * row.steps;
  if (l == row.max) return 0;  // max - max may be NaN
  return steps < float(kSampleBins - 1) ? int(steps) : kSampleBins - 1;
}

// Atomics of 64 bits in shared memory are loops, those of 32 are instructions. Each time the low
// half wraps, one of the adders sees it.
__device__ __forceinline__ void add_mass(SampleShared& shared, int place, uint64_t mass) {
  const auto low = uint32_t(mass);
  const auto before =
      uint32_t(shared_add(reinterpret_cast<int32_t*>(&shared.low[place]), int32_t(low)));
  const uint32_t high = uint32_t(mass >> 32) + (before + low < before ? 1 : 0);
  if (high) shared_add(reinterpret_cast<int32_t*>(&shared.high[place]), int32_t(high));
}
__device__ __forceinline__ void clear_bins(SampleShared& shared) {
  for (int i = threadIdx.x; i < kSampleBins; i += kSampleThreads)
    shared.low[i] = shared.high[i] = 0;
  block_sync();
}
// The first bin, greatest logits first, with which the mass reaches limit_of(mass of all bins).
// search.found[level] has it, and `above` plus the mass before it.
template <class Limit>
__device__ __forceinline__ void find_bin(SampleShared& shared, SampleSearch& search, int level,
                                         uint64_t above, const Limit& limit_of) {
  block_sync();
  const int first = 2 * threadIdx.x;
  auto mass = [&](int place) { return uint64_t(shared.high[place]) << 32 | shared.low[place]; };
  const uint64_t left = mass(first), right = mass(first + 1);
  const Scan scan = block_scan(left + right, shared.scan);
  const double limit = limit_of(scan.total);
  const uint64_t before = above + scan.before;
  const bool left_reaches = !(double(before + left) < limit);
  const bool reaches = !(double(before + left + right) < limit);
  if (double(before) < limit && reaches)
    search.found[level] = {left_reaches ? first : first + 1, left_reaches ? before : before + left};
  block_sync();
}

// The smallest key that is kept of those from `floor` on: all logits weigh 1 (top-k, limit k), or
// what their weights are (top-p, limit p of the total).
__device__ __forceinline__ uint32_t threshold(SampleShared& shared, const SampleRow& row,
                                              uint32_t floor, bool counts, double share) {
  SampleSearch& search = shared.search[counts ? 0 : 1];
  auto mass = [&](float l) { return counts ? 1 : weight_of(weight_exp(row, l)); };
  clear_bins(shared);
  each_logit(row, [&](int, float l) {
    if (key_of(l) >= floor) add_mass(shared, step_of(row, l), mass(l));
  });
  double limit = 0;
  find_bin(shared, search, 0, 0, [&](uint64_t total) {
    limit = counts ? share : share * double(total);
    if (limit < 0.5) limit = 0.5;  // what has nothing above it is always kept
    return limit;
  });
  const int step = search.found[0].place;
  uint64_t above = search.found[0].above;
  // None: all are kept. Beyond the last step nothing has a weight: it is all the same to the draw.
  if (step < 0 || (step == kSampleBins - 1 && row.weighs)) return floor;

  auto hits = [&](float l) { return key_of(l) >= floor && step_of(row, l) == step; };
  each_logit(row, [&](int, float l) {
    if (!hits(l)) return;
    const int at = shared_add(&search.listed, 1);
    if (at < kSampleList) shared.list[at] = l;
  });

  uint32_t prefix = 0, mask = 0;
#pragma unroll 1
  for (int level = 1; level < 4; level++) {
    const int shift = level == 1 ? 21 : level == 2 ? 10 : 0;  // bit 10 twice
    constexpr uint32_t digit = kSampleBins - 1;
    clear_bins(shared);
    auto add = [&](float l) {
      const uint32_t key = key_of(l);
      if ((key & mask) == prefix) add_mass(shared, int(digit - (key >> shift & digit)), mass(l));
    };
    const int listed = search.listed;
    if (listed <= kSampleList) {
      for (int i = threadIdx.x; i < listed; i += kSampleThreads) add(shared.list[i]);
    } else {
      each_logit(row, [&](int, float l) {
        if (hits(l)) add(l);
      });
    }
    find_bin(shared, search, level, above, [&](uint64_t) { return limit; });
    above = search.found[level].above;
    prefix |= (digit - uint32_t(search.found[level].place)) << shift;
    mask |= digit << shift;
  }
  return prefix;
}

__global__ void __launch_bounds__(kSampleThreads) sample_kernel(const SampleArgs args) {
  auto& shared = *shared_memory<SampleShared>();
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  SampleRow row{
      args.logits + b * args.logits_stride, int(args.vocab), 0, args.temperature[b], 0, false};

  if (threadIdx.x < 2) {
    SampleSearch& search = shared.search[threadIdx.x];
    search.listed = 0;
    for (auto& found : search.found) found = {-1, 0};
  }
  float most = -__builtin_inff(), least = __builtin_inff();
  int first = INT32_MAX;  // column of `most`
  bool nan = false;
  each_logit(row, [&](int i, float l) {
    nan |= l != l;
    least = l < least ? l : least;
    if (l > most) most = l, first = i;
  });
  // The largest, and the first column of those; NaN above all.
  const uint64_t mine = nan ? UINT64_MAX : uint64_t(key_of(most)) << 32 | uint32_t(~first);
  const uint64_t best = block_largest(mine, shared.best);
  row.max = key_value(uint32_t(best >> 32));
  const bool empty = row.max == -__builtin_inff(), greedy = row.temperature == 0.f;
  if (threadIdx.x == 0)
    args.out[b] = best == UINT64_MAX ? kSampleNan : empty ? kSampleEmpty : int64_t(~uint32_t(best));
  if (best == UINT64_MAX || empty || greedy) return;

  const int32_t k = args.top_k[b];
  const float p = args.top_p[b], min_p = args.min_p[b];
  const bool top_k = k > 0 && k < row.vocab;
  const bool top_p = p < 1.f;
  uint32_t floor = 0;
  if (top_k || top_p) {
    const uint64_t top = block_largest(~key_of(least), shared.least);
    const float range = row.max - key_value(~uint32_t(top));
    const float used = -kLowestExponent * row.temperature;
    row.weighs = used >= 0 && used < range;
    row.steps = float(kSampleBins - 1) / (row.weighs ? used : range);
    if (top_k) floor = threshold(shared, row, floor, true, double(k));
    if (top_p) floor = threshold(shared, row, floor, false, double(p));
  }

  auto kept_weight = [&](float l) -> uint64_t {
    if (key_of(l) < floor) return 0;
    const float e = weight_exp(row, l);
    return e >= min_p ? weight_of(e) : 0;
  };
  // A warp sums a part of the row, then the block looks for the token in the part that has it.
  const int part = (row.vocab + kSampleWarps - 1) / kSampleWarps;
  auto end_of = [&](int w) { return (w + 1) * part < row.vocab ? (w + 1) * part : row.vocab; };
  uint64_t sum = 0;
  each_logit(row, warp * part + lane, end_of(warp), 32,
             [&](int, float l) { sum += kept_weight(l); });
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) shared.sums[warp] = sum;
  block_sync();
  const uint64_t of_part = shared.sums[lane], up_to = warp_scan(of_part);
  const uint64_t total = shuffle(up_to, 31);
  // floor(u * total / 2^64)
  auto left = uint64_t((unsigned __int128)philox(args.seed[b], args.offset[b]) * total >> 64);
  int w = 0;  // the first part up to which there is more than `left`
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    if (left >= shuffle(up_to, w + step - 1)) w += step;
  left -= shuffle(up_to - of_part, w);
  const int each = (part + kSampleThreads - 1) / kSampleThreads;
  const int begin = w * part + int(threadIdx.x) * each;
  const int end = begin + each < end_of(w) ? begin + each : end_of(w);
  uint64_t own = 0;
  for (int i = begin; i < end; i++) own += kept_weight(row.logits[i]);
  const Scan scan = block_scan(own, shared.scan);
  left -= scan.before;  // where it is less than that it wraps, and is more than any `own`
  if (left >= own) return;
  for (int i = begin; i < end; i++) {
    const uint64_t weight = kept_weight(row.logits[i]);
    if (left < weight) {
      args.out[b] = i;
      return;
    }
    left -= weight;
  }
}

inline cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.batch == 0) return cudaSuccess;
  return launch(sample_kernel, dim3(unsigned(args.batch)), dim3(kSampleThreads),
                sizeof(SampleShared), stream, args);
}

}  // namespace qk
