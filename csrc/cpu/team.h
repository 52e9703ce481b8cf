// A team of threads that runs one kernel after the other. A kernel is `void k(const Args&, Team&)`,
// executed by every thread; it has no parallel construct inside, so one team serves a single op as
// well as a whole decode step.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#define QK_PAUSE() __builtin_ia32_pause()
#else
#define QK_PAUSE() ((void)0)
#endif

namespace qk {

struct Range {
  int64_t begin, end;
};

// Pauses before a thread that waits goes to sleep: some 20 us.
constexpr int kSpins = 1000;

// Sleeps until `value`, which was `old`, is something else; returns for how many nanoseconds.
// Whoever stores it in one order with all other atomics (seq_cst) and then calls wake_all wakes
// everyone that sleeps.
int64_t sleep_while(const std::atomic<int32_t>& value, int32_t old);
void wake_all(std::atomic<int32_t>& value);

// Rows of a weight that threads are dealt at a time: half of a block of the layout.
constexpr int64_t kRowUnit = 32;

// The pieces of one thread's share that were begun: its own from the front, and from the back those
// that others took over because they had nothing left.
class alignas(64) Pieces {
 public:
  // The number of a piece, of `count`, that nobody else gets; -1 when all are taken.
  int64_t take(int64_t count, bool from_front) {
    uint64_t seen = taken_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t front = int64_t(seen & 0xffffffff), back = int64_t(seen >> 32);
      if (front + back >= count) return -1;
      const uint64_t one = from_front ? 1 : uint64_t(1) << 32;
      if (taken_.compare_exchange_weak(seen, seen + one, std::memory_order_relaxed))
        return from_front ? front : count - 1 - back;
    }
  }
  void reset() { taken_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> taken_{0};
};

// Kernels between two barriers that may hand out their pieces, and threads that may take part.
constexpr int kDeals = 4, kDealThreads = 32;

struct alignas(64) Barrier {
  std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int32_t> generation{0};  // of the width that Linux can sleep on
  std::atomic<int64_t> slept{0};                   // nanoseconds, of all threads
  alignas(64) std::atomic<int64_t> next{0};  // for work handed out dynamically; reset by Team::sync
  Pieces pieces[kDeals][kDealThreads];       // likewise
};

// Memory that a thread will read soon: parts of a weight. It is asked for while the thread waits
// for others, or computes, and the memory bus has nothing else to do.
struct Upcoming {
  struct Part {
    const char *at, *end;
  };
  Part parts[3] = {};  // codes, scales, zeros

  int64_t bytes() const {
    int64_t sum = 0;
    for (const Part& p : parts) sum += p.end - p.at;
    return sum;
  }

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
  int deals = 0;  // since the last barrier

  // The static share of this thread in `count` items.
  Range share(int64_t count) const { return share_of(rank, count); }
  Range share_of(int thread, int64_t count) const {
    return {count * thread / size, count * (thread + 1) / size};
  }

  // The share in the n rows of a weight, in units of kRowUnit. A gate that is quantized by kRowUnit
  // columns deals out the groups of a row by the same rule, so that a decode step needs no barrier
  // between them (Decoder::place_barriers).
  Range share_rows(int64_t n) const { return share_rows_of(rank, n); }
  Range share_rows_of(int thread, int64_t n) const {
    return share_of(thread, (n + kRowUnit - 1) / kRowUnit);
  }

  // Calls work(thread, piece) for the pieces 0 .. count(thread) - 1 of every thread's share: each
  // thread for its own, in order, and then, unless `own_only`, for the last ones of those who are
  // behind. So a core that is slow, or busy with something else, holds the others up for one piece
  // and not for its whole share.
  template <class Count, class Work>
  void deal(bool own_only, Count count, Work work) {
    if (size == 1 || own_only || deals == kDeals || size > kDealThreads) {
      const int64_t mine = count(rank);
      for (int64_t piece = 0; piece < mine; piece++) work(rank, piece);
      return;
    }
    Pieces* pieces = barrier->pieces[deals++];
    for (int i = 0; i < size; i++) {
      const int thread = (rank + i) % size;
      const int64_t all = count(thread);
      for (int64_t piece; (piece = pieces[thread].take(all, i == 0)) >= 0;) work(thread, piece);
    }
  }

  // Waits for every thread of the team. Spins for as long as an undisturbed thread may be late,
  // then sleeps: if another one lost its core to something else, it can have this thread's.
  void sync() {
    if (size == 1) return;
    const int dealt = deals;
    deals = 0;
    const int32_t generation = barrier->generation.load(std::memory_order_acquire);
    if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      barrier->arrived.store(0, std::memory_order_relaxed);
      barrier->next.store(0, std::memory_order_relaxed);
      for (int i = 0; i < dealt; i++)
        for (int thread = 0; thread < size; thread++) barrier->pieces[i][thread].reset();
      barrier->generation.store(generation + 1);
      wake_all(barrier->generation);
      return;
    }
    for (int spins = 0; barrier->generation.load(std::memory_order_acquire) == generation;) {
      if (upcoming.step()) continue;
      if (++spins < kSpins) QK_PAUSE();
      else barrier->slept += sleep_while(barrier->generation, generation);
    }
  }
};

}  // namespace qk
