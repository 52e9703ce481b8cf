// What emu.cpp (who runs), memory.cpp and global.cpp (what they touch) and hooks.cpp share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emu.h"

namespace qk::emu {

enum class Wait : uint8_t { none, warp, block, mbarrier, done };

struct AsyncCopy {
  char* to;
  const char* from;
  int bytes, valid;
};
struct Thread {
  Wait wait = Wait::none;
  const char* where = "its start";
  uint64_t* mbarrier = nullptr;
  int parity = 0;
  uint32_t fence = 0;                          // the block's epoch at the last device_fence
  bool depended = false;                       // has called dependency_wait
  std::vector<AsyncCopy> open;                 // copy_async since the last copy_commit
  std::vector<std::vector<AsyncCopy>> groups;  // committed, the oldest first
};
struct Warp {
  int arrived = 0;
  uint32_t epoch = 1;  // counts warp_sync
  const char* what = "";
  const void* in[32];
  void* out[32];
};
struct Buffer {
  uintptr_t begin, end;
  bool writable = false, constant = false;
  bool poisoned = false;  // the op is to write before it reads
  int64_t shadow = -1;    // of byte `begin`; -1 without
};
struct Mbarrier {
  int phase = 0;          // phases that have ended
  bool expected = false;  // the phase's arrival has come
  uint32_t bytes = 0, issued = 0;
  std::vector<AsyncCopy> copies;
  std::vector<bool> waited;  // by thread: has waited for the last phase that ended
};

struct Machine {
  const char* op = "";
  std::vector<Buffer> buffers;    // what global memory there is
  std::vector<Buffer> constants;  // read-only segments of the library
  Buffer argument{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<uint64_t*, Mbarrier> mbarriers;
  int current = -1;  // the fiber that runs
  int live = 0, at_block = 0;
  uint32_t block_epoch = 1;                    // counts block_sync
  uint32_t serial = 0;                         // counts runs of blocks
  uint32_t first_serial = 0, op_serial = 0;    // the launch's and the op's first
  bool dependent = false, depended = false;    // the launch is; some thread has waited
  uintptr_t stack_begin = 0, stack_bytes = 0;  // of the fiber that runs
  std::string failure;
  std::vector<std::pair<std::string, uintptr_t>> frames;  // library and offset of callers
};
extern Machine machine;

// Under ASan there are no hooks: plain accesses go unseen, so nothing is known of what came before.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kHistory = false;
#else
constexpr bool kHistory = true;
#endif
extern bool fiber_runs;

void yield();                     // to the scheduler, until ready again
[[noreturn]] void stop_launch();  // to the scheduler, for good
void find_constants();
void start_op();
void start_grid(size_t blocks);
void start_block();
// Whether what thread `who` of this block did in these epochs comes before what the current thread
// does now.
bool ordered(int who, uint32_t block_epoch, uint32_t warp_epoch);
void check_global(const void* p, size_t bytes, Access kind, const char* what);
void size_shared(size_t bytes);
void clear_shared();
bool mbarrier_done(uint64_t* barrier, int parity);

}  // namespace qk::emu
