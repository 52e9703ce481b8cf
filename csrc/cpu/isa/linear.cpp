// y [M, N] = x [M, K] @ dequantize(w [N, K]).T + bias [N]. Codes of 4 and 8 bits; flat and
// two-level scales.
//
// Threads share the rows of the weight, 32 at a time. Scratch that is prepared by the whole team
// (int8 activations of many tokens, 16-bit float activations) must not be handed to another kernel
// before the team has met at a barrier.
#include "linear_float.h"
#include "linear_int8.h"

namespace qk::QK_ISA {

int64_t linear_scratch(const LinearArgs& a, int team) {
  return a.x ? float_scratch(a, team) : int8_scratch(a, team);
}

void linear(const LinearArgs& a, void* scratch, Team& team) {
  if (a.x) float_linear(a, scratch, team);
  else int8_linear(a, scratch, team);
}

}  // namespace qk::QK_ISA
