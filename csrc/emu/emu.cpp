// Fibers, blocks and warps of the emulated GPU.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it must wait (for
// its warp, its block, a bulk copy); then the next ready one runs, in an order that changes from
// launch to launch. Blocks run one after another, also in changing order: no block may wait for
// another. When no fiber is ready the block has deadlocked, and the report says who waits where.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define QK_UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define QK_UNPOISON(p, n)
#endif

#if defined(__x86_64__) && !defined(QK_EMU_UCONTEXT)
#define QK_OWN_SWITCH 1
#else
#define QK_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace qk::emu {

Indices now;
Machine machine;
bool fiber_runs = false;  // the hooks ask before constructors have run

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kMostThreads = 1024;

std::recursive_mutex one_at_a_time;  // launches of one thread after those of another

// ---- switching fibers ----

struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;  // ASan's
};

#if QK_OWN_SWITCH
// Saves what a call must preserve and the stack pointer, and goes on where `to` was saved.
extern "C" void qk_emu_switch(void** save, void* to);
asm(R"(
.text
.type qk_emu_switch, @function
qk_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qk_emu_switch, .-qk_emu_switch
)");
struct Context : Stack {
  void* sp = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    bottom = stack, size = bytes;
    auto* top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to; it does not. It keeps the stack aligned too
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    sp = top;
  }
};
void switch_stacks(Context& from, Context& to) { qk_emu_switch(&from.sp, to.sp); }
#else
struct Context : Stack {
  ucontext_t context;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    bottom = stack, size = bytes;
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
void switch_stacks(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// ASan is told, or it takes a fiber's frames for those of another stack.
void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
  switch_stacks(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

struct Fiber {
  Context context;
  Dim3 index;
};

struct Scheduler {
  char* stacks = nullptr;  // kMostThreads of kStack
  std::vector<Fiber> fibers;
  Context main;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  uint64_t launches = 0;
};
Scheduler scheduler;

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  Context& host = scheduler.main;
  __sanitizer_finish_switch_fiber(nullptr, &host.bottom, &host.size);
#endif
  scheduler.body(scheduler.argument);
  Thread& me = machine.threads[size_t(machine.current)];
  me.wait = Wait::done;
  machine.live--;
  Context& context = scheduler.fibers[size_t(machine.current)].context;
  switch_to(context, scheduler.main);
  std::abort();  // a fiber that is done does not run again
}

void run_fiber(int id) {
  Fiber& fiber = scheduler.fibers[size_t(id)];
  machine.current = id;
  machine.stack_begin = reinterpret_cast<uintptr_t>(scheduler.stacks) + size_t(id) * kStack;
  now.thread = fiber.index;
  fiber_runs = true;
  switch_to(scheduler.main, fiber.context);
  fiber_runs = false;
}

// "block (0, 1, 0), thread 35: waits at block_sync" of the first few that are not done.
std::string who_waits() {
  std::string out;
  int told = 0, more = 0;
  for (size_t i = 0; i < machine.threads.size(); i++) {
    const Thread& t = machine.threads[i];
    if (t.wait == Wait::done) continue;
    if (told == 4) {
      more++;
      continue;
    }
    out += "; thread " + std::to_string(i) + " waits at " + t.where;
    told++;
  }
  if (more) out += "; and " + std::to_string(more) + " more";
  return out;
}

void run_block(const std::vector<int>& order) {
  const int threads = int(machine.threads.size());
  machine.live = threads;
  machine.at_block = 0;
  machine.block_epoch = 1;
  std::fill(machine.warps.begin(), machine.warps.end(), Warp{});
  machine.mbarriers.clear();
  clear_shared();
  start_block();
  for (int i = 0; i < threads; i++) {
    machine.threads[size_t(i)] = Thread{};
    char* stack = scheduler.stacks + size_t(i) * kStack;
    QK_UNPOISON(stack, kStack);
    scheduler.fibers[size_t(i)].context.prepare(stack, kStack, entry);
  }
  while (machine.live > 0) {
    bool moved = false;
    for (const int id : order) {
      Thread& t = machine.threads[size_t(id)];
      if (t.wait == Wait::mbarrier && mbarrier_done(t.mbarrier, t.parity)) t.wait = Wait::none;
      if (t.wait != Wait::none) continue;
      moved = true;
      run_fiber(id);
      if (!machine.failure.empty()) return;
    }
    if (!moved) {
      machine.failure = "deadlock, " + std::to_string(machine.live) + " of " +
                        std::to_string(threads) + " threads wait" + who_waits();
      return;
    }
  }
}

// Where in the device code a failure came from, if addr2line is there to say.
// QKERNELS_EMU_SOURCES=0 does not ask, which is faster where many failures are expected.
std::string source_of(const std::vector<std::pair<std::string, uintptr_t>>& frames) {
  const char* wanted = std::getenv("QKERNELS_EMU_SOURCES");
  if (frames.empty() || (wanted && std::strcmp(wanted, "0") == 0)) return "";
  const std::string& library = frames[0].first;
  std::string command = "addr2line -Cfpse '" + library + "'", out;
  for (const auto& [file, offset] : frames) {
    char hexadecimal[24];
    std::snprintf(hexadecimal, sizeof hexadecimal, " %zx", size_t(offset));
    if (file == library) command += hexadecimal;
  }
  if (FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, "\n")] = 0;
      if (line[0] != '?') out += std::string("\n  ") + line;
    }
    pclose(pipe);
  }
  return out;
}

}  // namespace

void begin(const char* op) {
  one_at_a_time.lock();
  machine.op = op;
  start_op();
}
void end() {
  forget();
  one_at_a_time.unlock();
}

Limits limits() {
  const auto setting = [](const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
  };
  const int architecture = setting("QKERNELS_EMU_ARCHITECTURE", 90);
  // KB that a multiprocessor has, of which a block may have all but one; Turing's may have it all.
  const int has = architecture < 80                              ? 64
                  : architecture == 80 || architecture == 87     ? 164
                  : architecture < 90 || architecture / 10 == 12 ? 100
                                                                 : 228;
  const int may = architecture < 80 ? has : has - 1;
  return {architecture, setting("QKERNELS_EMU_MULTIPROCESSORS", 132), may << 10, has << 10};
}

bool launch(Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(const void*),
            const void* argument, size_t argument_bytes, bool dependent) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  const bool fits = threads >= 1 && threads <= kMostThreads && block.z <= 64 && blocks >= 1 &&
                    grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535 &&
                    shared_bytes <= size_t(limits().shared_per_block);
  if (!fits) return false;
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  if (scheduler.stacks == nullptr) {
    void* memory = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    scheduler.stacks = static_cast<char*>(memory);
    find_constants();
  }
  machine.stack_bytes = kStack;
  const auto first = reinterpret_cast<uintptr_t>(argument);
  machine.argument = {first, first + argument_bytes};
  machine.dependent = dependent;
  now.sm75 = limits().architecture < 80;
  start_grid(blocks);
  machine.threads.assign(threads, Thread{});
  machine.warps.assign((threads + 31) / 32, Warp{});
  scheduler.fibers.assign(threads, Fiber{});
  scheduler.body = body, scheduler.argument = argument;
  size_shared(shared_bytes);
  now.block_dim = block, now.grid_dim = grid;
  for (unsigned i = 0; i < threads; i++)
    scheduler.fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  if (threads % 32) throw std::runtime_error("emulated GPU: a block must be whole warps");

  const uint64_t turn = scheduler.launches++;
  std::mt19937_64 random(turn);
  std::vector<int> order(threads);
  for (size_t i = 0; i < threads; i++) order[i] = int(i);
  if (turn % 3 == 1) std::reverse(order.begin(), order.end());
  if (turn % 3 == 2) std::shuffle(order.begin(), order.end(), random);
  for (size_t i = 0; i < blocks; i++) {
    const size_t at = turn % 2 ? blocks - 1 - i : i;
    now.block = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y),
                 unsigned(at / grid.x / grid.y)};
    run_block(order);
    if (machine.failure.empty()) continue;
    std::string message;
    message.swap(machine.failure);
    char place[160];
    std::snprintf(place, sizeof place, "emulated GPU: %s, block (%u, %u, %u) of (%u, %u, %u), ",
                  machine.op, now.block.x, now.block.y, now.block.z, grid.x, grid.y, grid.z);
    const std::string source = source_of(machine.frames);
    machine.frames.clear();
    throw std::runtime_error(place + message + source);
  }
  if (dependent && !machine.depended)
    throw std::runtime_error(std::string("emulated GPU: ") + machine.op +
                             ": no thread of a dependent launch has called dependency_wait, so the "
                             "launch behind it could start before the one before it has ended");
  return true;
}

void yield() {
  Context& mine = scheduler.fibers[size_t(machine.current)].context;
  switch_to(mine, scheduler.main);
}

void stop_launch() {
  Context dropped;
  switch_to(dropped, scheduler.main);
  std::abort();
}

// ---- meeting ----

void block_sync() {
  Thread& me = machine.threads[size_t(machine.current)];
  const int threads = int(machine.threads.size());
  if (machine.live < threads)
    fail("block_sync after %d threads of the block have ended", threads - machine.live);
  me.where = "block_sync";
  if (++machine.at_block < threads) {
    me.wait = Wait::block;
    yield();
    return;
  }
  machine.at_block = 0;
  machine.block_epoch++;
  for (Thread& t : machine.threads) t.wait = Wait::none;
}

namespace {

// The lanes of a warp meet at `what`; the last one calls f.
template <class F>
void meet(const char* what, const void* in, void* out, const F& f) {
  const int id = machine.current;
  Thread& me = machine.threads[size_t(id)];
  Warp& warp = machine.warps[size_t(id / 32)];
  Thread* lanes = &machine.threads[size_t(id / 32 * 32)];
  for (int l = 0; l < 32; l++)
    if (lanes[l].wait == Wait::done) fail("%s after lane %d of the warp has ended", what, l);
  if (warp.arrived && std::strcmp(warp.what, what) != 0)
    fail("is at %s while other lanes of its warp are at %s", what, warp.what);
  warp.what = what, warp.in[id % 32] = in, warp.out[id % 32] = out;
  me.where = what;
  if (++warp.arrived < 32) {
    me.wait = Wait::warp;
    yield();
    return;
  }
  warp.arrived = 0;
  f(warp);
  for (int l = 0; l < 32; l++) lanes[l].wait = Wait::none;
}

}  // namespace

void warp_sync() {
  meet("warp_sync", nullptr, nullptr, [](Warp& warp) { warp.epoch++; });
}
void collective(const char* what, const void* in, void* out, Compute compute) {
  meet(what, in, out, [&](Warp& warp) {
    fiber_runs = false;  // the lanes' operands lie on stacks that are not this fiber's
    compute(warp.in, warp.out);
    fiber_runs = true;
  });
}

}  // namespace qk::emu
