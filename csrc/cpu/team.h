// A team of threads that runs one kernel after the other. A kernel is `void k(const Args&, Team&)`,
// executed by every thread; it has no parallel construct inside, so one team serves a single op as
// well as a whole decode step.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#define QK_PAUSE() __builtin_ia32_pause()
#else
#define QK_PAUSE() ((void)0)
#endif

namespace qk {

struct Range {
  int64_t begin, end;
};

// Rows of a weight that threads are dealt at a time: half of a block of the layout.
constexpr int64_t kRowUnit = 32;

struct alignas(64) Barrier {
  std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> generation{0};
  alignas(64) std::atomic<int64_t> next{0};  // for work handed out dynamically; reset by Team::sync
};

// Memory that a thread will read soon. It is asked for while the thread waits for others, when the
// memory bus has nothing else to do.
struct Upcoming {
  struct Part {
    const char *at, *end;
  };
  Part parts[3] = {};  // the codes of a weight, its scales, its zeros

  // Asks for one more line; false when there is none.
  bool step() {
    for (Part& p : parts) {
      if (p.at >= p.end) continue;
      __builtin_prefetch(p.at, 0, 2);
      p.at += 64;
      return true;
    }
    return false;
  }
};

struct Team {
  int rank;
  int size;
  Barrier* barrier;
  Upcoming upcoming{};

  // The static share of this thread in `count` items, in whole multiples of `grain`.
  Range share(int64_t count, int64_t grain = 1) const {
    const int64_t chunks = (count + grain - 1) / grain;
    const int64_t begin = chunks * rank / size * grain, end = chunks * (rank + 1) / size * grain;
    return {begin, end < count ? end : count};
  }

  // The share in the n rows of a weight, in units of kRowUnit. A gate that is quantized by kRowUnit
  // columns deals out the groups of a row by the same rule, so that a decode step needs no barrier
  // between them (Decoder::place_barriers).
  Range share_rows(int64_t n) const { return share((n + kRowUnit - 1) / kRowUnit); }

  // Waits for every thread of the team. Spins, then yields, so that a busy core does not stall the
  // others.
  void sync() {
    if (size == 1) return;
    const int64_t generation = barrier->generation.load(std::memory_order_acquire);
    if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      barrier->arrived.store(0, std::memory_order_relaxed);
      barrier->next.store(0, std::memory_order_relaxed);
      barrier->generation.store(generation + 1, std::memory_order_release);
      return;
    }
    int spins = 0;
    while (barrier->generation.load(std::memory_order_acquire) == generation) {
      if (upcoming.step()) continue;
      if (spins++ < 2000) QK_PAUSE();
      else std::this_thread::yield();
    }
  }
};

}  // namespace qk
