// sample, but for who computes: one token per row of logits. Checks and allocates, then calls
// kRun(op, logits, args) unless there are no rows.
#pragma once
#include <cmath>

#include "check.h"

namespace qk {

// Where contents are unchecked, the settings may be anything (a row out of range draws some token,
// but reads nothing beyond its logits), and whoever reads the tokens must look for kSampleNan and
// kSampleEmpty.
using SampleRun = void (*)(const char* op, const Tensor& logits, const SampleArgs&);

constexpr int64_t kMaxVocab = 1 << 22;  // 2^22 weights of at most 2^40 sum to less than 2^63

inline void check_sample_settings(const char* op, const SampleArgs& a) {
  for (int64_t b = 0; b < a.batch; b++) {
    const float t = a.temperature[b], p = a.top_p[b], m = a.min_p[b];
    check(t >= 0 && std::isfinite(t), op, "temperature must be finite and not negative, got ", t,
          " in row ", b);
    check(a.top_k[b] >= 0, op, "top_k must not be negative (0 is off), got ", a.top_k[b],
          " in row ", b);
    check(p >= 0 && p <= 1, op, "top_p must be from 0 to 1 (1 is off), got ", p, " in row ", b);
    check(m >= 0 && m <= 1, op, "min_p must be from 0 to 1 (0 is off), got ", m, " in row ", b);
  }
}

inline void check_sampled(const char* op, const SampleArgs& a) {
  for (int64_t b = 0; b < a.batch; b++) {
    check(a.out[b] != kSampleNan, op, "logits of row ", b, " have a NaN");
    check(a.out[b] != kSampleEmpty, op, "logits of row ", b, " are all -inf");
  }
}

// logits [B, V] float32, rows a constant stride apart; the others [B] -> [B] int64
template <SampleRun kRun, Contents kContents>
Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
              const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& offset) {
  constexpr const char* op = "sample";
  check(logits.scalar_type() == ScalarType::Float, op, "logits must be float32, got ",
        type_name(logits.scalar_type()));
  SampleArgs a{};
  a.logits_stride = row_stride(op, "logits", logits);
  a.batch = logits.size(0), a.vocab = logits.size(1);
  check(a.vocab > 0 && a.vocab <= kMaxVocab, op, "logits must have 1 to ", kMaxVocab,
        " columns, got ", shape_of(logits));
  const auto setting = [&](const char* name, const Tensor& t, ScalarType type) {
    expect(op, name, t, type, {a.batch});
    same_device(op, name, t, "logits", logits);
  };
  setting("temperature", temperature, ScalarType::Float);
  setting("top_k", top_k, ScalarType::Int);
  setting("top_p", top_p, ScalarType::Float);
  setting("min_p", min_p, ScalarType::Float);
  setting("seed", seed, ScalarType::Long);
  setting("offset", offset, ScalarType::Long);
  a.logits = data<float>(logits), a.temperature = data<float>(temperature);
  a.top_k = data<int32_t>(top_k);
  a.top_p = data<float>(top_p), a.min_p = data<float>(min_p);
  a.seed = data<int64_t>(seed), a.offset = data<int64_t>(offset);
  if constexpr (kContents == Contents::checked) check_sample_settings(op, a);
  Tensor out = empty_on(logits, {a.batch}, ScalarType::Long);
  a.out = mutable_data<int64_t>(out);
  if (a.batch > 0) kRun(op, logits, a);
  if constexpr (kContents == Contents::checked) check_sampled(op, a);
  return out;
}

}  // namespace qk
