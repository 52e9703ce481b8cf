// Global memory of the emulated GPU: the buffers that an op handed over and, for up to kShadowed
// bytes of those that may be written, who touched each byte.
//
// Two threads touch a byte of global memory in order
// - in one block, if a barrier lies between them, as in shared memory;
// - in two blocks, if the first block has then told of it (device_fence and an atomic, by the
// thread
//   itself or behind a barrier) and the second has heard (an atomic, likewise) before it looks: the
//   way of a block that arrives last and sums up what others left. It reads with load_other_block,
//   or after a device_fence of its own, since L1 does not follow what other multiprocessors write.
// Which atomics meet is not looked at: blocks run one after another, so any of an earlier block
// counts. Otherwise, if one of the two writes, they race: most of all, this finds wrong indices.
#include <dlfcn.h>
#include <link.h>

#include <cstring>

#include "state.h"

namespace qk::emu {
namespace {

constexpr size_t kShadowed = 1 << 20;

struct Touch {
  uint32_t serial = 0;           // of the block's run; blocks of earlier launches do not count
  uint32_t block = 0, warp = 0;  // epochs
  uint16_t thread = 0;
  bool atomic = false;
  bool shared = false;  // of a read: other threads too, since the block's last barrier
};
struct Shadow {
  Touch write, read;
};
std::vector<Shadow> shadow;  // of all buffers that have one, one after another
size_t shadow_used = 0;

// What a block told, and when.
struct Release {
  bool told = false;
  int thread = 0;
  uint32_t block = 0, warp = 0;
  uint32_t fence = 0, every_fence = 0;  // epochs of the last fence: of the thread, of all threads
};
std::vector<Release> releases;  // by serial, from machine.first_serial on

// What this block heard first, and its first fence after that.
struct Heard {
  bool yes = false;
  int thread = 0;
  uint32_t block = 0, warp = 0;
};
Heard heard, fenced;

uint32_t warp_epoch() { return machine.warps[size_t(machine.current / 32)].epoch; }
bool known(const Heard& h) { return h.yes && ordered(h.thread, h.block, h.warp); }

bool told(const Touch& t) {
  const Release& r = releases[t.serial - machine.first_serial];
  const bool before = t.thread == r.thread || t.block < r.block ||
                      (t.thread / 32 == r.thread / 32 && t.warp < r.warp);
  const bool by_teller = r.fence && (t.thread == r.thread || t.block < r.fence);
  return r.told && before && (by_teller || r.every_fence >= t.block);
}
bool counts(const Touch& t) { return t.serial >= machine.first_serial; }
// Whether what t says comes before what the current thread does now.
bool precedes(const Touch& t) {
  if (t.serial == machine.serial) return ordered(t.thread, t.block, t.warp);
  return told(t) && known(heard);
}
std::string who(const Touch& t) {
  const std::string thread = "thread " + std::to_string(t.thread);
  if (t.serial == machine.serial) return thread;
  return thread + " of another block (run " + std::to_string(t.serial - machine.first_serial) + ")";
}

void touch(const Buffer& b, Shadow& s, int64_t at, Access kind, const char* what) {
  const auto place = static_cast<long long>(at);
  const bool writes = kind == Access::write || kind == Access::atomic;
  const bool both_atomic = kind == Access::atomic && s.write.atomic;
  const Touch now{machine.serial, machine.block_epoch, warp_epoch(), uint16_t(machine.current),
                  kind == Access::atomic};
  if (kind != Access::write && b.poisoned && s.write.serial < machine.op_serial)
    fail("%s of byte %lld of a buffer, which nobody has written", what, place);
  if (counts(s.write) && kind == Access::read_constant)
    fail(
        "read of byte %lld of a buffer, which %s has written in this launch, by a path that sees "
        "no writes",
        place, who(s.write).c_str());
  if (counts(s.write) && !both_atomic && !precedes(s.write))
    fail("%s of byte %lld of a buffer races with the write of %s", what, place,
         who(s.write).c_str());
  const bool elsewhere = counts(s.write) && s.write.serial != machine.serial;
  if (elsewhere && kind == Access::read && !known(fenced))
    fail(
        "%s of byte %lld of a buffer, which %s has written, through L1: use load_other_block, or "
        "device_fence before",
        what, place, who(s.write).c_str());
  if (!writes) {
    const bool same = s.read.serial == now.serial && s.read.block == now.block;
    const bool more = same && (s.read.shared || s.read.thread != now.thread);
    s.read = now;
    s.read.shared = more;
    return;
  }
  const bool others = s.read.shared && s.read.serial == machine.serial &&
                      s.read.block == machine.block_epoch && s.read.thread / 32 != now.thread / 32;
  if (counts(s.read) && (others || !precedes(s.read)))
    fail("%s of byte %lld of a buffer races with the read of %s", what, place, who(s.read).c_str());
  s.write = now;
}

bool inside(const Buffer& b, uintptr_t first, size_t bytes) {
  return first >= b.begin && first + bytes <= b.end;
}

}  // namespace

void forget() {
  machine.buffers.clear();
  shadow_used = 0;
}
void start_op() { machine.op_serial = machine.serial + 1; }
void start_grid(size_t blocks) {
  releases.assign(blocks, Release{});
  machine.first_serial = machine.serial + 1;
  machine.depended = false;
}
void start_block() {
  machine.serial++;
  heard = fenced = Heard{};
}

void allow(const void* memory, int64_t bytes, Use use) {
  if (bytes <= 0 || memory == nullptr) return;
  const auto first = reinterpret_cast<uintptr_t>(memory);
  Buffer b{first, first + size_t(bytes)};
  b.writable = use == Use::write, b.constant = use == Use::constant;
  if (b.writable && shadow_used + size_t(bytes) <= kShadowed) {
    b.shadow = int64_t(shadow_used);
    shadow_used += size_t(bytes);
    if (shadow.size() < shadow_used) shadow.resize(shadow_used);
  }
  machine.buffers.push_back(b);
}
void expect_new_constants() {
  for (Buffer& b : machine.buffers) b.constant = false;
}
void poison(void* memory, int64_t bytes) {
  std::memset(memory, 0xff, size_t(bytes));
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (Buffer& b : machine.buffers)
    if (b.writable && b.begin == first && b.end == first + size_t(bytes)) b.poisoned = true;
}
void written(const void* memory) {
  for (Buffer& b : machine.buffers)
    if (b.begin == reinterpret_cast<uintptr_t>(memory)) b.poisoned = false;
}
void fill(void* memory, int value, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(memory);
  bool found = bytes == 0;
  for (Buffer& b : machine.buffers) {
    if (!b.writable || !inside(b, first, bytes)) continue;
    found = true;
    for (size_t i = 0; b.shadow >= 0 && i < bytes; i++)
      shadow[size_t(b.shadow) + (first - b.begin) + i].write.serial = machine.op_serial;
  }
  if (!found)
    throw std::runtime_error(std::string("emulated GPU: ") + machine.op +
                             ": cudaMemsetAsync of memory that was not handed over to be written");
  std::memset(memory, value, bytes);
  machine.serial++;  // what was filled counts as written by an earlier launch
}

void device_fence() {
  machine.threads[size_t(machine.current)].fence = machine.block_epoch;
  if (known(heard) && !fenced.yes)
    fenced = {true, machine.current, machine.block_epoch, warp_epoch()};
}
void dependency_wait() {
  machine.threads[size_t(machine.current)].depended = true;
  machine.depended = true;
}

void check_global(const void* p, size_t bytes, Access kind, const char* what) {
  const auto first = reinterpret_cast<uintptr_t>(p);
  const bool writes = kind == Access::write || kind == Access::atomic;
  const Thread& me = machine.threads[size_t(machine.current)];
  bool read_only = false, allowed = false, constant = false;
  const Buffer* tracked = nullptr;
  for (const Buffer& b : machine.buffers)
    if (inside(b, first, bytes)) {
      if (b.writable && tracked == nullptr) tracked = &b;
      if (b.writable || !writes) allowed = true;
      else read_only = true;
      if (b.constant) constant = true;
    }
  if (allowed) {
    if (machine.dependent && !me.depended && (writes || !constant))
      fail("%s before dependency_wait of memory that the launch before may use", what);
    if (!kHistory || tracked == nullptr || tracked->shadow < 0) return;
    const auto at = int64_t(first - tracked->begin);
    for (int64_t i = at; i < at + int64_t(bytes); i++)
      touch(*tracked, shadow[size_t(tracked->shadow + i)], i, kind, what);
    if (kind != Access::atomic) return;
    uint32_t every = UINT32_MAX;
    for (const Thread& t : machine.threads) every = t.fence < every ? t.fence : every;
    releases[machine.serial - machine.first_serial] = {
        true, machine.current, machine.block_epoch, warp_epoch(), me.fence, every};
    if (!heard.yes) heard = {true, machine.current, machine.block_epoch, warp_epoch()};
    return;
  }
  if (read_only) fail("%s of %zu bytes of a buffer that is read only", what, bytes);
  if (!writes) {
    if (inside(machine.argument, first, bytes)) return;
    for (const Buffer& b : machine.constants)
      if (inside(b, first, bytes)) return;
  }
  // The nearest buffer says most of what went wrong.
  const Buffer* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Buffer& b : machine.buffers) {
    const uintptr_t d = first < b.begin ? b.begin - first : first + bytes - b.end;
    if (d < distance) distance = d, nearest = &b;
  }
  if (nearest == nullptr) fail("%s of %zu bytes at %p, and there are no buffers", what, bytes, p);
  fail("%s of %zu bytes at byte %lld of a buffer of %zu", what, bytes,
       static_cast<long long>(first) - static_cast<long long>(nearest->begin),
       size_t(nearest->end - nearest->begin));
}

void find_constants() {
  const auto add = [](dl_phdr_info* info, size_t, void*) {
    const auto here = reinterpret_cast<uintptr_t>(&find_constants);
    std::vector<Buffer> found;
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const auto& part = info->dlpi_phdr[i];
      if (part.p_type != PT_LOAD) continue;
      const uintptr_t first = info->dlpi_addr + part.p_vaddr, last = first + part.p_memsz;
      ours = ours || (here >= first && here < last);
      if (!(part.p_flags & PF_W)) found.push_back({first, last});
    }
    if (ours) machine.constants = found;
    return ours ? 1 : 0;
  };
  dl_iterate_phdr(add, nullptr);
}

}  // namespace qk::emu
