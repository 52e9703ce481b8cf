// What is compiled once, not per instruction set: the library's own code for sleeping.
#include "team.h"

#include <chrono>

namespace qk {

int64_t sleep_while(const std::atomic<int32_t>& value, int32_t old) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  value.wait(old, std::memory_order_acquire);
  return std::chrono::nanoseconds(Clock::now() - start).count();
}
void wake_all(std::atomic<int32_t>& value) { value.notify_all(); }

}  // namespace qk
