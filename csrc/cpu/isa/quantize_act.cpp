#include "quantize.h"

namespace qk::QK_ISA {

void quantize_act(const QuantizeActArgs& a, Team& team) {
  const int64_t groups = a.out.kx / a.out.group;
  const Range share = team.share(a.m * groups);
  with_type(a.x_type, [&](auto io) __attribute__((always_inline)) {
    using T = decltype(io);
    each_item(share, groups, [&](int64_t row, int64_t g) __attribute__((always_inline)) {
      const auto* x = static_cast<const typename T::type*>(a.x) + row * a.x_stride;
      quantize_group<false>(row_out(a.out, row, groups), g, a.out.group, a.k,
                            [&](int64_t i, auto whole) __attribute__((always_inline)) {
                              return load_columns<T, decltype(whole)::value>(x, i, a.k);
                            });
    });
  });
}

}  // namespace qk::QK_ISA
