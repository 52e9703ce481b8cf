// How many threads a step of few tokens runs on.
#pragma once
#include <algorithm>

namespace qk {

// A core that another process keeps busy is taken away for milliseconds at a time, and every thread
// waits at the next barrier until it is back. If that happens again and again, one thread less is
// faster, for the next kFewer steps; then all are tried again.
class SteadyThreads {
 public:
  // Threads of the next step, of `all`.
  int count(int all) const { return fewer_ > 0 ? std::max(all - 1, 1) : all; }

  // stalled: in the step, a thread was waited for so long that it must have lost its core.
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

  int fewer_ = 0;               // steps left on one thread less
  int steps_ = 0, stalls_ = 0;  // on all threads, in this window
};

}  // namespace qk
