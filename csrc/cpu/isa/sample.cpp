// One token per row of logits: temperature, then top-k, top-p and min-p, then one categorical draw.
//
// The result is the same bit for bit on every instruction set, team size and device that follows
// these rules:
//   d_i = (l_i - max) / temperature, and 0 where l_i = max
//   e_i = exp(d_i) by the float32 operations of `weight_exp`, none of them fused, and 0 below
//   kLowest w_i = round half to even (e_i * 2^40), an integer, so that sums do not depend on their
//   order top-k: kept if fewer than k logits are greater (so ties with the k-th stay) top-p: kept
//   if the weight of the greater logits that top-k kept, `above`, is 0 or < p * total, in float64
//   min-p: kept if e_i >= min_p (the largest e is 1)
//   u = r1 * 2^32 + r0 of Philox4x32-10, key (seed low, high), counter (offset low, high, 0, 0)
//   the token is the first whose cumulative weight of kept tokens exceeds floor(u * total / 2^64)
#include "simd.h"

namespace qk::QK_ISA {
namespace {

typedef double VD __attribute__((vector_size(8 * W)));
typedef int64_t VL __attribute__((vector_size(8 * W)));

constexpr float kLowest = -29.f;  // exp(-29) < 2^-41: its weight rounds to 0
constexpr int kChunks =
    256;  // of a row: partial sums for the draw, maxima that bound top-k from below
constexpr int kBins = 2048;  // 11 bits of a key per level

struct Row {
  const float* logits;  // [V]
  int64_t vocab;
  float max, temperature;
};

// The W logits from column i on; columns beyond the end are -inf, which no filter and no draw ever
// picks.
QK_INLINE VF logits_at(const Row& row, int64_t i) {
  if (i + W <= row.vocab) return load(row.logits + i);
  VF v = splat(-__builtin_inff());
  for (int64_t j = 0; i + j < row.vocab; j++) v[j] = row.logits[i + j];
  return v;
}

// Unsigned integers in the order of the floats, -0 equal to 0; no NaN comes here.
QK_INLINE VU key_of(VF v) {
  const VI bits = (VI)(v + splat(0.f));
  return (VU)(bits ^ (bits >> 31 | splat_i(INT32_MIN)));
}

QK_INLINE bool any(VI mask) {
  uint64_t words[W / 2], all = 0;
  std::memcpy(words, &mask, sizeof words);
  for (int i = 0; i < W / 2; i++) all |= words[i];
  return all != 0;
}

// e of the logits l.
QK_INLINE VF weight_exp(const Row& row, VF l) {
  const VF top = splat(row.max);
  const VF d = l == top ? splat(0.f) : (l - top) / splat(row.temperature);
  const VF x = vmax(d, splat(kLowest));
  const VI n = round_int(x * splat(1.44269504f));
  const VF nf = to_float(n);
  VF r = x - nf * splat(0.693145751953125f);  // ln 2 to 16 bits: the product is exact
  r = r - nf * splat(1.42860677e-6f);
  VF p = splat(1.3888889e-3f);
  p = p * r + splat(8.3333333e-3f);
  p = p * r + splat(4.1666667e-2f);
  p = p * r + splat(1.6666667e-1f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.f);
  p = p * r + splat(1.f);
  const VF e = p * (VF)((n + 127) << 23);
  return d < splat(kLowest) ? splat(0.f) : e;
}

// round(e * 2^40): the unit in the last place of [4096, 8192) is 2^-40 in float64, so the sum's
// mantissa is the weight.
QK_INLINE VL weight_of(VF e) {
  const VD anchor = VD{} + 4096.0;
  return (VL)(__builtin_convertvector(e, VD) + anchor) - (VL)anchor;
}

QK_INLINE int64_t reduce_add_i64(VL v) {
  int64_t sum = 0;
  for (int i = 0; i < W; i++) sum += v[i];
  return sum;
}

// Threshold of a filter that keeps a logit while the mass above it is below a limit: the smallest
// key kept, or `floor` if all from there on are. `mass(logits)` gives what each of W logits weighs,
// `limit(total)` the limit, at least 0.5. A radix search, 11 bits a level: the histogram of a level
// has the mass of the logits that share the bits found so far.
template <class Mass, class Limit>
__attribute__((noinline)) uint32_t threshold(const Row& row, uint32_t floor, Mass mass,
                                             Limit limit_of) {
  int64_t bins[kBins], above = 0;
  double limit = 0;
  uint32_t prefix = 0, mask = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const int bits = shift == 0 ? 10 : 11;
    std::memset(bins, 0, sizeof(int64_t) << bits);
    for (int64_t i = 0; i < row.vocab; i += W) {
      const VF l = logits_at(row, i);
      const VU key = key_of(l);
      const VI hit = (VI)(key >= floor) & (VI)((key & mask) == prefix);
      if (!any(hit)) continue;
      const VL amount = mass(l);
      const VU bin = key >> shift & (kBins - 1);
      uint32_t at[W];
      int32_t counts[W];
      int64_t add[W];
      store_raw(at, bin), store_raw(counts, hit), store_raw(add, amount);
      for (int j = 0; j < W; j++)
        if (counts[j] && i + j < row.vocab) bins[at[j] & ((1 << bits) - 1)] += add[j];
    }
    if (shift == 21) {
      int64_t total = 0;
      for (int b = 0; b < kBins; b++) total += bins[b];
      limit = limit_of(total);
    }
    int b = (1 << bits) - 1;
    while (b >= 0 && double(above + bins[b]) < limit) above += bins[b--];
    if (b < 0)
      return floor;  // only on the first level: later ones hold the mass that reaches the limit
    prefix |= uint32_t(b) << shift, mask |= uint32_t((1 << bits) - 1) << shift;
  }
  return prefix > floor ? prefix : floor;
}

// 64 random bits: the first two words of Philox4x32-10 (Salmon et al. 2011).
QK_INLINE uint64_t philox(int64_t seed, int64_t offset) {
  uint32_t key[2] = {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)};
  uint32_t c[4] = {uint32_t(offset), uint32_t(uint64_t(offset) >> 32), 0, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(c[0]) * 0xd2511f53u, b = uint64_t(c[2]) * 0xcd9e8d57u;
    const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key[0], uint32_t(b),
                              uint32_t(a >> 32) ^ c[3] ^ key[1], uint32_t(a)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9e3779b9u, key[1] += 0xbb67ae85u;
  }
  return uint64_t(c[1]) << 32 | c[0];
}

// Columns of a chunk: whole vectors, at most kChunks chunks in a row.
QK_INLINE int64_t chunk_columns(int64_t vocab) {
  const int64_t vectors = (vocab + W - 1) / W;
  return (vectors + kChunks - 1) / kChunks * W;
}

// Sets row.max and the maxima of the chunks; false if there is a NaN.
QK_INLINE bool find_max(Row& row, float* maxima, int chunks, int64_t columns) {
  VI nan = {};
  row.max = -__builtin_inff();
  for (int c = 0; c < chunks; c++) {
    VF top = splat(-__builtin_inff());
    const int64_t end = (c + 1) * columns < row.vocab ? (c + 1) * columns : row.vocab;
    for (int64_t i = c * columns; i < end; i += W) {
      const VF l = logits_at(row, i);
      nan |= (VI)(l != l);
      top = vmax(top, l);
    }
    maxima[c] = reduce_max(top);
    row.max = row.max > maxima[c] ? row.max : maxima[c];
  }
  return !any(nan);
}

// The first column of row.max: only the first chunk that has it is searched.
QK_INLINE int64_t first_of_max(const Row& row, const float* maxima, int64_t columns) {
  int64_t c = 0;
  while (maxima[c] != row.max) c++;
  int64_t i = c * columns;
  while (row.logits[i] != row.max) i++;
  return i;
}

QK_INLINE int64_t sample_row(const SampleArgs& a, int64_t b) {
  Row row{a.logits + b * a.logits_stride, a.vocab, 0.f, a.temperature[b]};
  const int64_t columns = chunk_columns(row.vocab);
  const int chunks = int((row.vocab + columns - 1) / columns);
  float maxima[kChunks];
  if (!find_max(row, maxima, chunks, columns)) return kSampleNan;
  if (row.max == -__builtin_inff()) return kSampleEmpty;
  if (row.temperature == 0.f) return first_of_max(row, maxima, columns);

  const auto one = [](VF) __attribute__((always_inline)) { return VL{} + 1; };
  const auto weight = [&row](VF l)
                          __attribute__((always_inline)) { return weight_of(weight_exp(row, l)); };
  uint32_t floor = 0;
  const int32_t k = a.top_k[b];
  if (k > 0 && k < row.vocab) {
    const double limit = k;
    const auto count = [limit](int64_t) { return limit; };
    // k chunks whose maxima reach a bound are k logits that do: almost all others are passed over
    // at once.
    if (k <= chunks) floor = threshold(Row{maxima, chunks, 0.f, 1.f}, 0, one, count);
    floor = threshold(row, floor, one, count);
  }
  const float p = a.top_p[b];
  if (p < 1.f) {
    floor = threshold(row, floor, weight, [p](int64_t total) {
      const double limit = double(p) * double(total);
      return limit < 0.5 ? 0.5 : limit;  // above = 0 is always kept
    });
  }

  const VF least = splat(a.min_p[b]);
  const auto kept_weight = [&](int64_t i) __attribute__((always_inline)) {
    const VF l = logits_at(row, i);
    const VI kept = (VI)(key_of(l) >= floor);
    if (!any(kept)) return VL{};
    const VF e = weight_exp(row, l);
    return weight_of((VF)((VI)e & kept & (VI)(e >= least)));
  };
  int64_t sums[kChunks], total = 0;
  for (int c = 0; c < chunks; c++) {
    VL sum = {};
    const int64_t end = (c + 1) * columns < row.vocab ? (c + 1) * columns : row.vocab;
    for (int64_t i = c * columns; i < end; i += W) sum += kept_weight(i);
    sums[c] = reduce_add_i64(sum);
    total += sums[c];
  }
  const uint64_t bits = philox(a.seed[b], a.offset[b]);
  int64_t left = int64_t((unsigned __int128)bits * uint64_t(total) >> 64);
  int c = 0;
  while (left >= sums[c]) left -= sums[c++];  // total > left, so a chunk exceeds what is left
  for (int64_t i = c * columns;; i += W) {
    const VL w = kept_weight(i);
    for (int j = 0; j < W; j++) {
      if (left < w[j]) return i + j;
      left -= w[j];
    }
  }
}

}  // namespace

void sample(const SampleArgs& a, Team& team) {
  const Range share = team.share(a.batch);
  for (int64_t b = share.begin; b < share.end; b++) a.out[b] = sample_row(a, b);
}

}  // namespace qk::QK_ISA
