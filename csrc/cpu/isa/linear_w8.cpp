// Linear on codes of 8 bits.
#include "linear_float.h"
#include "linear_int8.h"

namespace qk::QK_ISA {

void int8_w8(const Int8Problem& p, Team& team) { int8_linear<Codes<8, false>>(p, team); }
void float_w8(const FloatProblem& p, Team& team) { float_linear<Codes<8, false>>(p, team); }

}  // namespace qk::QK_ISA
