// What the CPU's linear kernels take; shared by the linear ops and decoder_step.
#pragma once
#include "../check.h"

namespace qk {

// Scales of activations and weights meet in spans of min(G, Ga) columns, whose int32 sums must not
// overflow: 32768 * 255 * 127 plus the symmetric start of 32768 * 128 * 127 stays below 2^31.
constexpr int64_t kMaxSpan = 32768;

inline void check_linear_groups(const char* op, int64_t group, int64_t act_group) {
  check_group(op, "act_group", act_group);
  check(group % act_group == 0 || act_group % group == 0, op,
        "one of group_size and act_group must divide the other, got ", group, " and ", act_group);
  const int64_t span = group < act_group ? group : act_group;
  check(span <= kMaxSpan, op, "int8 activations need a group_size or act_group of at most ",
        kMaxSpan, ", got ", span);
}

}  // namespace qk
