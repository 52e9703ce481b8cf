// Teams of threads without torch: every piece is dealt once, whoever is slow; a thread that sleeps
// wakes up. Prints "ok", or what went wrong.
#include "team.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "steady_threads.h"

using namespace qk;

namespace {

void require(bool met, const char* what) {
  if (met) return;
  std::printf("%s\n", what);
  std::exit(1);
}

template <class F>
void on_threads(int size, Barrier& barrier, F f) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; rank++)
    threads.emplace_back([&, rank] {
      Team team{rank, size, &barrier};
      f(team);
    });
  for (std::thread& t : threads) t.join();
}

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

// Several deals between two barriers, more than there are places for, with one slow thread.
void deals_once(int size, bool own_only) {
  constexpr int rounds = 20, deals = kDeals + 2, pieces = 7;
  std::vector<std::atomic<int>> done(size_t(rounds * deals * size * pieces));
  std::atomic<int> taken_over{0};
  Barrier barrier;
  on_threads(size, barrier, [&](Team& team) {
    for (int round = 0; round < rounds; round++) {
      for (int deal = 0; deal < deals; deal++)
        team.deal(
            own_only, [&](int thread) { return int64_t((thread + deal) % (pieces + 1)); },
            [&](int thread, int64_t piece) {
              if (team.rank == 0) nap();
              require(!own_only || thread == team.rank, "a share was not kept");
              if (thread != team.rank) taken_over++;
              done[size_t(((round * deals + deal) * size + thread) * pieces + piece)]++;
            });
      team.sync();
    }
  });
  for (int i = 0; i < rounds * deals * size * pieces; i++) {
    const int piece = i % pieces, thread = i / pieces % size, deal = i / pieces / size % deals;
    require(done[size_t(i)] == (piece < (thread + deal) % (pieces + 1)),
            "a piece was not dealt once");
  }
  require((taken_over > 0) == (size > 1 && size <= kDealThreads && !own_only),
          "nothing was taken over from a slow thread, or something although it could not be");
}

// What one thread writes before a barrier is there for the others after it, however long they
// slept.
void barriers_hold(int size) {
  Barrier barrier;
  std::vector<int> at(size_t(size), 0);
  on_threads(size, barrier, [&](Team& team) {
    for (int round = 1; round <= 50; round++) {
      if (round % size == team.rank && round % 5 == 0)
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
      at[size_t(team.rank)] = round;
      team.sync();
      for (int other : at) require(other == round, "a barrier let a thread through");
      team.sync();
    }
  });
  require(size == 1 || barrier.slept > 3000000, "nobody slept while a thread was away for 3 ms");
}

void steady_threads() {
  require(SteadyThreads::stalled(3000000, 6000000), "3 of 6 ms are a lost core");
  require(!SteadyThreads::stalled(3000000, 180000000), "3 of 180 ms are not");
  require(!SteadyThreads::stalled(200000, 400000), "0.2 ms are not");
  SteadyThreads threads;
  for (int step = 0; step < 200; step++) {
    require(threads.count(2) == 2, "a thread was given up without need");
    threads.ran(step % 8 == 0);  // now and then
  }
  int alone = 0;
  for (int step = 0; step < 300; step++) {
    alone += threads.count(2) == 1;
    require(threads.count(1) == 1 && threads.count(8) == 8, "only one of two is given up");
    threads.ran(threads.count(2) == 2);  // always
  }
  require(alone > 240 && alone < 300, "a busy core was not given up, or never tried again");
  for (int step = 0; step < 40; step++) threads.ran(false);
  require(threads.count(2) == 2, "a core that is free again was not taken back");
}

}  // namespace

int main() {
  for (int size : {1, 2, 3, 7, kDealThreads + 1})
    for (bool own_only : {false, true}) deals_once(size, own_only);
  for (int size : {1, 2, 5}) barriers_hold(size);
  steady_threads();
  std::printf("ok\n");
}
