// What linear.cpp hands to the kernels of one width of codes. Each width is compiled on its own
// (linear_w2.cpp, ...): together they would be one translation unit of minutes.
#pragma once
#include "isa.h"

namespace qk::QK_ISA {

// Tokens are worked on in tiles of a few, which the registers hold the sums of. A tile never
// reaches over a multiple of kTokenBlock. One block of them, or kMostTokens where rows are short,
// is what a thread goes through with one block of weights before it turns to the next block of
// weights. Tokens of the tile that comes next, when `remaining` are left:
constexpr int64_t kTokenBlock = 120, kMostTokens = 2 * kTokenBlock;
constexpr int next_tile(int64_t remaining) {
#if defined(QK_ISA_AVX512)  // sums and operands of 32 rows x 6 tokens fit 32 registers, of 8 do not
  if (remaining == 11 || remaining == 8 || remaining == 7) return 4;
  return remaining == 5 ? 3 : remaining > 6 ? 6 : int(remaining);
#elif defined(QK_ISA_AVX2)  // 5 are better split 3 + 2 than 4 + 1
  return remaining == 5 ? 3 : remaining > 4 ? 4 : int(remaining);
#else
  return remaining >= 4 ? 4 : remaining >= 2 ? 2 : int(remaining);
#endif
}
// Calls f(token, tokens) for the tiles of tokens begin .. end - 1; begin is a multiple of
// kTokenBlock, and so is end or it is the last.
template <class F>
void for_each_tile(int64_t begin, int64_t end, F f) {
  for (int64_t block = begin; block < end; block += kTokenBlock) {
    const int64_t stop = block + kTokenBlock < end ? block + kTokenBlock : end;
    for (int64_t token = block; token < stop;) {
      const int tokens = next_tile(stop - token);
      f(token, tokens);
      token += tokens;
    }
  }
}

// What a token contributes to a span of int8 activations beside its codes.
struct SpanTerm {
  float scale;  // of the activations
  union {
    int32_t start;  // symmetric: -middle * sum
    float shift;    // integer: -sum; minimum: -scale * sum
  };
};
// Activations lie in the order in which a tile reads them, from one address on: tokens whose rows
// are some KB apart would share a few sets of the first-level cache.
struct Int8Problem {
  const LinearArgs& args;
  const int8_t* x;        // per tile of T tokens, one after the other: [columns / 16, T, 16]
  const SpanTerm* terms;  // likewise: [spans, T]
  int64_t columns;        // spans * span
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
