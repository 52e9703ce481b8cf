// Opens a team on torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace qk {

inline int team_size() { return int(torch::stable::get_num_threads()); }

// Runs f(Team&) on every thread that torch gives. Each first reports the share of the range it was
// handed; once all of it is reported the size of the team is known, so a nested call (one thread
// handed everything) is a team of one. f must not throw. Returns for how many nanoseconds the mean
// thread, of all but the slowest, slept because others were late.
template <class F>
int64_t run_team(int size, const F& f) {
  Barrier barrier;
  if (size <= 1) {
    Team solo{0, 1, &barrier};
    f(solo);
    return 0;
  }
  std::atomic<int32_t> reported{0};
  std::atomic<int> joined{0};
  torch::stable::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
    const int rank = joined.fetch_add(1, std::memory_order_relaxed);
    reported.fetch_add(int32_t(end - begin));
    wake_all(reported);
    int spins = 0;
    for (int32_t now; (now = reported.load(std::memory_order_acquire)) < size;) {
      if (++spins < kSpins) QK_PAUSE();
      else barrier.slept += sleep_while(reported, now);
    }
    Team team{rank, joined.load(std::memory_order_relaxed), &barrier};
    f(team);
    team.sync();  // where OpenMP would spin for milliseconds
  });
  return barrier.slept / (size - 1);
}

}  // namespace qk
