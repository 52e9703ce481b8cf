// linear and linear_quant on the CPU; their checks are in linear_ops.h.
#include "../linear_ops.h"

#include "kernels.h"
#include "run.h"
#include "scratch.h"

namespace qk {
namespace {

// Threads for a call. A second one takes 5 us to start, in which one core does this much by itself:
// [576, 576] of 4 bits with one token takes 15.7 us alone and 19.7 us with two (Zen 3).
int team_for(const LinearArgs& a) {
  const int64_t bytes = a.w.n * a.w.kp * a.w.bits / 8;
  const bool small = bytes * a.m <= (192 << 10);
  return small ? 1 : team_size();
}

void run(const char*, const Tensor& x, const Tensor&, LinearArgs& a, QuantizeActArgs* quantize) {
  const Kernels& kernel = kernels();
  const int team_size_now = team_for(a);
  Scratch scratch;
  int64_t codes_at = 0, scale_at = 0, sums_at = 0;
  if (quantize) {
    const int64_t kx = a.act.kx, groups = kx / a.act.group;
    codes_at = scratch.reserve(a.m * kx);
    scale_at = scratch.reserve(a.m * groups * int64_t(sizeof(float)));
    sums_at = scratch.reserve(a.m * (kx / 16) * int64_t(sizeof(int16_t)));
  }
  const int64_t kernel_at = scratch.reserve(kernel.linear_scratch(a, team_size_now));
  scratch.allocate(x);
  if (quantize) {
    QuantActOut& out = quantize->out;
    a.act.codes = out.codes = scratch.at<int8_t>(codes_at);
    a.act.scale = out.scale = scratch.at<float>(scale_at);
    a.act.sums = out.sums = scratch.at<int16_t>(sums_at);
  }
  run_team(team_size_now, [&](Team& team) {
    if (quantize) {
      kernel.quantize_act(*quantize, team);
      team.sync();
    }
    kernel.linear(a, scratch.at(kernel_at), team);
  });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear<run>));
  m.impl("linear_quant", TORCH_BOX(&linear_quant<run>));
}

}  // namespace
}  // namespace qk
