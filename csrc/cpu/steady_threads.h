// How many threads a step of few tokens runs on.
#pragma once
#include <cstdint>

namespace qk {

// A core that another process keeps busy is taken away for milliseconds at a time, and every thread
// waits at the next barrier until it is back. If that happens again and again to two threads, one
// alone is faster, for the next kFewer steps; then both are tried again. Of more threads none is
// given up: torch would start all of them anyway, and it may not be the right one.
class SteadyThreads {
 public:
  // Threads of the next step, of `all`.
  int count(int all) const { return all == 2 && fewer_ > 0 ? 1 : all; }

  // Whether threads that slept for so long in a step, of so many nanoseconds, waited for one that
  // had lost its core: large models have steps of many milliseconds, and threads are never quite
  // even.
  static bool stalled(int64_t slept, int64_t step) { return slept > 1000000 && slept > step / 4; }

  void ran(bool stalled) {
    if (fewer_ > 0) {
      fewer_--;
      return;
    }
    steps_++, stalls_ += stalled;
    if (stalls_ == kStalls) fewer_ = kFewer;
    if (stalls_ == kStalls || steps_ == kWindow) steps_ = stalls_ = 0;
  }

 private:
  static constexpr int kWindow = 16, kStalls = 4, kFewer = 24;

  int fewer_ = 0;               // steps left on one thread
  int steps_ = 0, stalls_ = 0;  // on all threads, in this window
};

}  // namespace qk
