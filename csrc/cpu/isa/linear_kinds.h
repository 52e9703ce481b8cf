// What linear.cpp hands to the kernels of one width of codes. Each width is compiled on its own
// (linear_w2.cpp, ...): together they would be one translation unit of minutes.
#pragma once
#include "isa.h"

namespace qk::QK_ISA {

// What a token contributes to a span of int8 activations beside its codes.
struct SpanTerm {
  float scale;  // of the activations
  union {
    int32_t start;  // symmetric: -middle * sum
    float shift;    // integer: -sum; minimum: -scale * sum
  };
};
struct Int8Problem {
  const LinearArgs& args;
  const SpanTerm* terms;  // [M, spans]
  int64_t spans, groups;  // spans of all columns; groups of a row of the weight
  int span, spans_per_group;
};
struct FloatProblem {
  const LinearArgs& args;
  const float* x;  // [M, K], rows x_stride apart
  int64_t x_stride;
  float* panel;  // this thread's: kPanelFloats, then kSumFloats
};

// Columns that are dequantized at a time with float activations, and tokens that share them.
constexpr int kPanelCols = 64;
constexpr int64_t kFloatTokenBlock = 128;
constexpr int64_t kPanelFloats = kPanelCols * 64;
constexpr int64_t kSumFloats = kFloatTokenBlock * 64;

void int8_w2(const Int8Problem&, Team&);
void int8_w3(const Int8Problem&, Team&);
void int8_w4(const Int8Problem&, Team&);
void int8_w5(const Int8Problem&, Team&);
void int8_w6(const Int8Problem&, Team&);
void int8_w8(const Int8Problem&, Team&);
void int8_table(const Int8Problem&, Team&);
void float_w2(const FloatProblem&, Team&);
void float_w3(const FloatProblem&, Team&);
void float_w4(const FloatProblem&, Team&);
void float_w5(const FloatProblem&, Team&);
void float_w6(const FloatProblem&, Team&);
void float_w8(const FloatProblem&, Team&);
void float_table(const FloatProblem&, Team&);

}  // namespace qk::QK_ISA
