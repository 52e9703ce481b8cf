// Shared memory of the emulated GPU: who last touched which byte, and the copies that are on their
// way. (Global memory: global.cpp.)
//
// Two threads touch a byte of shared memory in order if a block_sync lies between them, or a
// warp_sync if they are of one warp, or the wait for the copy that one of them made. Otherwise, if
// one of them writes, they race, whatever order the fibers ran in.
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace qk::emu {
namespace {

enum class Content : uint8_t {
  none,     // never written
  plain,    // written by `writer`
  atomic,   // written by atomics since the last barrier
  pending,  // a copy_async or bulk_load is on its way
  arrived,  // by a bulk_load, whose mbarrier is `barrier`
};
struct Shadow {
  Content content = Content::none;
  uint16_t writer = 0;
  uint32_t write_block = 0, write_warp = 0;  // epochs
  uint32_t read_block = 0, read_warps = 0;   // the epoch, and which warps have read in it
  uint32_t read_warp = 0, read_lanes = 0;    // of the last of these warps: its epoch and lanes
  // The last plain write, which atomics after it must come after.
  uint16_t plain_writer = 0;
  uint32_t plain_block = 0, plain_warp = 0;
  uint64_t* barrier = nullptr;
  uint32_t serial = 0;  // of the block's run
};

alignas(128) char shared[256 << 10];
size_t shared_size = 0;
std::vector<Shadow> shadows(sizeof shared);
Shadow& shadow(int at) {
  Shadow& s = shadows[size_t(at)];
  if (s.serial != machine.serial) s = Shadow{}, s.serial = machine.serial;
  return s;
}

int offset_of(const void* p) { return int(static_cast<const char*>(p) - shared); }
bool is_shared(const void* p) {
  return p >= static_cast<void*>(shared) && p < static_cast<void*>(shared + sizeof shared);
}

void read_shared(Shadow& s, int at, const char* what) {
  const int me = machine.current;
  switch (s.content) {
    case Content::none: fail("%s of shared byte %d, which nobody has written", what, at);
    case Content::pending:
      fail("%s of shared byte %d, into which a copy is on its way that nobody has waited for", what,
           at);
    case Content::arrived: {
      const Mbarrier& b = machine.mbarriers[s.barrier];
      const bool waited = b.waited.size() > size_t(me) && b.waited[size_t(me)];
      if (!waited && !ordered(s.writer, s.write_block, s.write_warp))
        fail("%s of shared byte %d, which a bulk copy brought: this thread has not waited for it",
             what, at);
      break;
    }
    default:
      if (!ordered(s.writer, s.write_block, s.write_warp))
        fail("%s of shared byte %d races with the write of thread %d", what, at, int(s.writer));
  }
  const uint32_t warp_epoch = machine.warps[size_t(me / 32)].epoch;
  if (s.read_block != machine.block_epoch) s.read_block = machine.block_epoch, s.read_warps = 0;
  const uint32_t bit = 1u << (me / 32);
  const bool same = s.read_warps == bit && s.read_warp == warp_epoch;
  s.read_warps |= bit;
  s.read_warp = warp_epoch;
  s.read_lanes = (same ? s.read_lanes : 0) | 1u << (me % 32);
}

// Fails unless a write now comes after all that was done before.
void check_write(const Shadow& s, int at, const char* what, bool atomic) {
  const int me = machine.current;
  if (s.content == Content::pending)
    fail("%s of shared byte %d, into which a copy is on its way", what, at);
  const bool both_atomic = atomic && s.content == Content::atomic;
  if (s.content != Content::none && !both_atomic && !ordered(s.writer, s.write_block, s.write_warp))
    fail("%s of shared byte %d races with the write of thread %d", what, at, int(s.writer));
  if (both_atomic && !ordered(s.plain_writer, s.plain_block, s.plain_warp))
    fail("%s of shared byte %d races with the write of thread %d", what, at, int(s.plain_writer));
  if (s.read_block != machine.block_epoch) return;
  const uint32_t bit = 1u << (me / 32), lane = 1u << (me % 32);
  if (s.read_warps & ~bit)
    fail("%s of shared byte %d races with a read of warp %d", what, at,
         __builtin_ctz(s.read_warps & ~bit));
  if (s.read_warp == machine.warps[size_t(me / 32)].epoch && (s.read_lanes & ~lane))
    fail("%s of shared byte %d races with a read of lane %d of its warp", what, at,
         __builtin_ctz(s.read_lanes & ~lane));
}
void set_writer(Shadow& s, Content content) {
  const int me = machine.current;
  s.content = content;
  s.writer = uint16_t(me);
  s.write_block = machine.block_epoch;
  s.write_warp = machine.warps[size_t(me / 32)].epoch;
  if (content == Content::atomic) return;
  s.plain_writer = s.writer, s.plain_block = s.write_block, s.plain_warp = s.write_warp;
}

void check_shared_bounds(const void* p, size_t bytes, const char* what) {
  if (size_t(offset_of(p)) + bytes > shared_size)
    fail("%s of %zu bytes at shared byte %d; the block has %zu", what, bytes, offset_of(p),
         shared_size);
}

}  // namespace

bool ordered(int who, uint32_t block_epoch, uint32_t warp_epoch) {
  const int me = machine.current;
  if (who == me || block_epoch < machine.block_epoch) return true;
  return who / 32 == me / 32 && warp_epoch < machine.warps[size_t(me / 32)].epoch;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.failure = "thread " + std::to_string(machine.current) + ": " + text;
  // Behind this function: up to eight callers, most of them inlined ones of the kernel.
  void* frames[10];
  const int count = backtrace(frames, 10);
  for (int i = 1; i < count; i++) {
    Dl_info info;
    if (dladdr(frames[i], &info) && info.dli_fname)
      machine.frames.emplace_back(info.dli_fname, reinterpret_cast<uintptr_t>(frames[i]) - 1 -
                                                      reinterpret_cast<uintptr_t>(info.dli_fbase));
  }
  stop_launch();
}

void size_shared(size_t bytes) { shared_size = bytes; }
void clear_shared() { std::memset(shared, 0xfb, shared_size); }
void* shared_bytes() { return shared; }

void access(const void* p, size_t bytes, Access kind) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  if (first - machine.stack_begin < machine.stack_bytes) return;  // a local variable
  const bool index = first - reinterpret_cast<uintptr_t>(&now) < sizeof now;
  if (index && kind == Access::read) return;
  const char* what = kind == Access::write ? "write" : kind == Access::atomic ? "atomic" : "read";
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && first % bytes)
    fail("%s of %zu bytes at an address that is not a multiple of it", what, bytes);
  if (!is_shared(p)) return check_global(p, bytes, kind, what);
  check_shared_bounds(p, bytes, what);
  if (!kHistory) return;
  const int at = offset_of(p);
  for (int i = at; i < at + int(bytes); i++) {
    Shadow& s = shadow(i);
    if (kind != Access::write && kind != Access::atomic) {
      read_shared(s, i, what);
      continue;
    }
    if (kind == Access::atomic && s.content == Content::none)
      fail("atomic of shared byte %d, which nobody has written", i);
    check_write(s, i, what, kind == Access::atomic);
    // The first atomic after a barrier reads what the writes before it left.
    set_writer(s, kind == Access::atomic ? Content::atomic : Content::plain);
  }
}

// ---- copies ----

namespace {

void start_copy(void* to, const void* from, int bytes, int valid, Access kind, const char* what) {
  if (!is_shared(to)) fail("%s to %p, which is not shared memory", what, to);
  check_shared_bounds(to, size_t(bytes), what);
  if (valid > 0) check_global(from, size_t(valid), kind, what);
  const int at = offset_of(to);
  for (int i = at; kHistory && i < at + bytes; i++) {
    check_write(shadow(i), i, what, false);
    set_writer(shadow(i), Content::pending);
  }
  std::memset(to, 0xcd, size_t(bytes));
}

void land(const AsyncCopy& copy, Content content, uint64_t* barrier) {
  std::memcpy(copy.to, copy.from, size_t(copy.valid));
  std::memset(copy.to + copy.valid, 0, size_t(copy.bytes - copy.valid));
  const int at = offset_of(copy.to);
  for (int i = at; i < at + copy.bytes; i++) {
    set_writer(shadow(i), content);
    shadow(i).barrier = barrier;
  }
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, int valid) {
  if (valid < 0 || valid > bytes) fail("copy_async of %d valid bytes out of %d", valid, bytes);
  const bool aligned = reinterpret_cast<uintptr_t>(to) % unsigned(bytes) == 0 &&
                       (valid == 0 || reinterpret_cast<uintptr_t>(from) % unsigned(bytes) == 0);
  if (!aligned) fail("copy_async of %d bytes between addresses that are no multiples of it", bytes);
  start_copy(to, from, bytes, valid, bytes == 16 ? Access::read_l2 : Access::read, "copy_async");
  machine.threads[size_t(machine.current)].open.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid});
}
void copy_commit() {
  Thread& me = machine.threads[size_t(machine.current)];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
void copy_wait(int groups) {
  Thread& me = machine.threads[size_t(machine.current)];
  while (int(me.groups.size()) > groups) {
    for (const AsyncCopy& copy : me.groups.front()) land(copy, Content::plain, nullptr);
    me.groups.erase(me.groups.begin());
  }
}

void mbarrier_init(uint64_t* barrier) {
  access(barrier, 8, Access::write);
  machine.mbarriers[barrier] = Mbarrier{};
}
namespace {
Mbarrier& mbarrier_at(uint64_t* barrier, const char* what) {
  const auto found = machine.mbarriers.find(barrier);
  if (found == machine.mbarriers.end()) fail("%s of an mbarrier that was not initialized", what);
  if (!is_shared(barrier)) fail("%s of an mbarrier that is not in shared memory", what);
  access(barrier, 8, Access::read);
  return found->second;
}
}  // namespace
void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  Mbarrier& b = mbarrier_at(barrier, "mbarrier_expect");
  if (b.expected) fail("mbarrier_expect twice in one phase");
  b.expected = true, b.bytes = bytes;
}
void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  Mbarrier& b = mbarrier_at(barrier, "bulk_load");
  const auto odd =
      (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16;
  if (odd) fail("bulk_load of %u bytes: addresses and size must be multiples of 16", bytes);
  if (bytes == 0) fail("bulk_load of nothing");
  start_copy(to, from, int(bytes), int(bytes), Access::read_constant, "bulk_load");
  b.issued += bytes;
  b.copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), int(bytes), int(bytes)});
  if (b.expected && b.issued > b.bytes)
    fail("bulk_load: %u bytes of a phase that expects %u", b.issued, b.bytes);
}
bool mbarrier_done(uint64_t* barrier, int parity) {
  const Mbarrier& b = machine.mbarriers[barrier];
  const bool ended = b.expected && b.issued == b.bytes;
  return ((b.phase + (ended ? 1 : 0)) & 1) != parity;
}
void mbarrier_wait(uint64_t* barrier, int parity) {
  Mbarrier& b = mbarrier_at(barrier, "mbarrier_wait");
  Thread& me = machine.threads[size_t(machine.current)];
  me.where = "mbarrier_wait";
  if (!mbarrier_done(barrier, parity)) {
    me.wait = Wait::mbarrier, me.mbarrier = barrier, me.parity = parity;
    yield();
  }
  // The copies land as late as they may: when the first thread stops waiting for them.
  if (b.expected && b.issued == b.bytes && (b.phase & 1) == parity) {
    b.phase++;
    b.expected = false, b.bytes = b.issued = 0;
    b.waited.assign(machine.threads.size(), false);
    for (const AsyncCopy& copy : b.copies) land(copy, Content::arrived, barrier);
    b.copies.clear();
  }
  if (b.waited.empty()) b.waited.assign(machine.threads.size(), false);
  b.waited[size_t(machine.current)] = true;
}

}  // namespace qk::emu
