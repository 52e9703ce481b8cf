// cpu_peak: how many operations per second the threads can do at best; the caller takes the time.
#include <string>

#include "../check.h"
#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

// cpu_peak(str kind, int steps) -> int: multiplies and adds registers, `steps` rounds on every
// thread, as "int8" or "float32". Returns the operations done by all threads, two per product.
int64_t cpu_peak(std::string kind, int64_t steps) {
  constexpr const char* op = "cpu_peak";
  const bool int8 = kind == "int8";
  check(int8 || kind == "float32", op, "kind must be \"int8\" or \"float32\", got \"", kind, "\"");
  check(steps > 0, op, "steps must be positive, got ", steps);
  const auto run = int8 ? kernels().peak_int8 : kernels().peak_float32;
  std::atomic<int64_t> done{0};
  run_team(team_size(), [&](Team&) { done.fetch_add(run(steps), std::memory_order_relaxed); });
  return done.load();
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CompositeExplicitAutograd, m) {
  m.impl("cpu_peak", TORCH_BOX(&cpu_peak));
}

}  // namespace
}  // namespace qk
