// y [M, N] = x [M, K] @ dequantize(w [N, K]).T + bias [N] + residual [M, N], for every kind of
// weight: what is done once per call, and the choice among the kernels of each width.
//
// Threads share the rows of the weight, 32 at a time. Scratch that is prepared by the whole team
// (int8 activations of many tokens, 16-bit float activations) must not be handed to another kernel
// before the team has met at a barrier.
#include "linear_kinds.h"
#include "simd.h"

#include "../../layout.h"

namespace qk::QK_ISA {
namespace {

// Up to this many terms of a single token each thread prepares its own copy, which saves a barrier.
// The threads' places do not depend on the shapes, so that kernels that follow each other without a
// barrier may share the scratch.
constexpr int64_t kPrivateTerms = 4096;

int span_columns(const LinearArgs& a) { return a.w.group < a.act.group ? a.w.group : a.act.group; }
// Both lengths are whole groups, so whole spans. Beyond the shorter one there are only padded, zero
// codes.
int64_t span_count(const LinearArgs& a) {
  return (a.w.kp < a.act.kx ? a.w.kp : a.act.kx) / span_columns(a);
}
bool terms_are_private(const LinearArgs& a) { return a.m == 1 && span_count(a) <= kPrivateTerms; }

int64_t terms_bytes(const LinearArgs& a, int team) {
  const int64_t terms = terms_are_private(a) ? team * kPrivateTerms : a.m * span_count(a);
  return layout::round_up(terms * int64_t(sizeof(SpanTerm)), 64);
}
int64_t int8_scratch(const LinearArgs& a, int team) {
  const int64_t codes = a.m == 1 ? 0 : a.m * span_count(a) * span_columns(a);
  return terms_bytes(a, team) + codes;
}

// Fills terms [spans, tokens] of a tile whose first token is `token`.
void prepare_terms(const LinearArgs& a, int64_t token, int tokens, SpanTerm* terms) {
  const QuantAct& act = a.act;
  const int64_t spans = span_count(a);
  const int span = span_columns(a), units = span / 16, spans_per_scale = act.group / span;
  const int middle = a.w.table ? 128 : 1 << (a.w.bits - 1);
  for (int t = 0; t < tokens; t++) {
    const float* scale = act.scale + (token + t) * (act.kx / act.group);
    const int16_t* sums = act.sums + (token + t) * (act.kx / 16);
    SpanTerm* out = terms + t;
    for (int64_t s = 0, left = spans_per_scale; s < spans; s++, sums += units, out += tokens) {
      int32_t sum = 0;
      for (int u = 0; u < units; u++) sum += sums[u];
      out->scale = *scale;
      if (a.w.zero_kind == Zero::symmetric) out->start = -middle * sum;
      else if (a.w.zero_kind == Zero::integer) out->shift = float(-sum);
      else out->shift = *scale * float(-sum);
      if (--left == 0) scale++, left = spans_per_scale;
    }
  }
}

// Fills x [columns / 16, tokens, 16] of a tile.
void prepare_codes(const LinearArgs& a, int64_t token, int tokens, int64_t columns, int8_t* x) {
  const int8_t* from = a.act.codes + token * a.act.kx;
  for (int64_t k = 0; k < columns; k += 16)
    for (int t = 0; t < tokens; t++, x += 16) std::memcpy(x, from + t * a.act.kx + k, 16);
}

void int8_linear(const LinearArgs& a, void* scratch, Team& team) {
  SpanTerm* terms = (SpanTerm*)scratch;
  const int span = span_columns(a);
  const int64_t spans = span_count(a), columns = spans * span;
  const int8_t* x = a.act.codes;
  if (terms_are_private(a)) {
    terms += team.rank * kPrivateTerms;
    prepare_terms(a, 0, 1, terms);
  } else {
    int8_t* codes = (int8_t*)scratch + terms_bytes(a, team.size);
    if (a.m > 1) x = codes;
    int64_t tile = 0;
    for_each_tile(0, a.m, [&](int64_t token, int tokens) {
      if (tile++ % team.size != team.rank) return;
      prepare_terms(a, token, tokens, terms + token * spans);
      if (a.m > 1) prepare_codes(a, token, tokens, columns, codes + token * columns);
    });
    team.sync();
  }
  const Int8Problem p{a, x, terms, columns, spans, a.w.kp / a.w.group, span, a.w.group / span};
  if (a.w.table) return int8_table(p, team);
  switch (a.w.bits) {
    case 2: return int8_w2(p, team);
    case 3: return int8_w3(p, team);
    case 4: return int8_w4(p, team);
    case 5: return int8_w5(p, team);
    case 6: return int8_w6(p, team);
    default: return int8_w8(p, team);
  }
}

int64_t float_scratch(const LinearArgs& a, int team) {
  const int64_t converted = a.x_type == Dtype::f32 ? 0 : a.m * a.w.k;
  return (converted + team * (kPanelFloats + kSumFloats)) * int64_t(sizeof(float));
}

// Rows of x [M, K] as float32; tokens begin .. end - 1.
void convert_rows(const LinearArgs& a, float* out, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto io) {
    using X = decltype(io);
    for (int64_t t = begin; t < end; t++) {
      const typename X::type* x = (const typename X::type*)a.x + t * a.x_stride;
      float* to = out + t * a.w.k;
      int64_t k = 0;
      for (; k + W <= a.w.k; k += W) store(to + k, X::load(x + k));
      for (; k < a.w.k; k++) to[k] = X::get(x + k);
    }
  });
}

void float_linear(const LinearArgs& a, void* scratch, Team& team) {
  float* panel = (float*)scratch + team.rank * (kPanelFloats + kSumFloats);
  const float* x = (const float*)a.x;
  int64_t x_stride = a.x_stride;
  if (a.x_type != Dtype::f32) {
    float* converted = (float*)scratch + team.size * (kPanelFloats + kSumFloats);
    const Range tokens = team.share(a.m);
    convert_rows(a, converted, tokens.begin, tokens.end);
    team.sync();
    x = converted, x_stride = a.w.k;
  }
  const FloatProblem p{a, x, x_stride, panel};
  if (a.w.table) return float_table(p, team);
  switch (a.w.bits) {
    case 2: return float_w2(p, team);
    case 3: return float_w3(p, team);
    case 4: return float_w4(p, team);
    case 5: return float_w5(p, team);
    case 6: return float_w6(p, team);
    default: return float_w8(p, team);
  }
}

}  // namespace

int64_t linear_scratch(const LinearArgs& a, int team) {
  return a.x ? float_scratch(a, team) : int8_scratch(a, team);
}

void linear(const LinearArgs& a, void* scratch, Team& team) {
  if (a.x) float_linear(a, scratch, team);
  else int8_linear(a, scratch, team);
}

}  // namespace qk::QK_ISA
