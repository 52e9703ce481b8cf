#include "quantize.h"

namespace qk::QK_ISA {

void quantize_act(const QuantizeActArgs& a, Team& team) {
  const int64_t groups = a.out.kx / a.out.group;
  const Range share = team.share(a.m * groups);
  with_type(a.x_type, [&](auto io) __attribute__((always_inline)) {
    using T = decltype(io);
    for (int64_t item = share.begin; item < share.end; item++) {
      const auto* x = static_cast<const typename T::type*>(a.x) + item / groups * a.x_stride;
      quantize_group<false>(row_out(a.out, item / groups), item % groups, a.out.group,
                            [&](int64_t i)
                                __attribute__((always_inline)) { return load_upto<T>(x, i, a.k); });
    }
  });
}

}  // namespace qk::QK_ISA
