// Linear on 4-bit codes that are indices into a table of 16 int8 values.
#include "linear_float.h"
#include "linear_int8.h"

namespace qk::QK_ISA {

void int8_table(const Int8Problem& p, Team& team) { int8_linear<Codes<4, true>>(p, team); }
void float_table(const FloatProblem& p, Team& team) { float_linear<Codes<4, true>>(p, team); }

}  // namespace qk::QK_ISA
