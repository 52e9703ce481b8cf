// A GPU for tests: runs device code on the host, the threads of a block as fibers, one block after
// another, and reports what would be wrong on a real one. See emu.cpp for how.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qk::emu {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3() = default;
  Dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs: what threadIdx and its kin read.
struct Indices {
  Dim3 thread, block, block_dim, grid_dim;
  bool sm75 = false;  // the launch plays an architecture before 80
};
extern Indices now;

// ---- what a boundary tells ----

// From begin to end an op launches. Until end, device code may touch the buffers that were allowed
// and no others: `bytes` from `memory` on; nothing writes to one that is not writable. What no
// kernel at all writes is a constant: a dependent launch may read it before it waits.
enum class Use { read, write, constant };
void begin(const char* op);
void end();
void allow(const void* memory, int64_t bytes, Use use);
// This op's constants may be what the launch before it writes.
void expect_new_constants();
// Fills memory that a kernel is to overwrite with 0xff, which is NaN in every float type, and has
// reads reported of what the op has not written.
void poison(void* memory, int64_t bytes);
// An output that something else than device code, torch, has overwritten in the meantime.
void written(const void* memory);
// What was allowed to an op that ends before it launches.
void forget();
// cudaMemsetAsync.
void fill(void* memory, int value, size_t bytes);

// Runs body(argument) in every thread of the grid; argument is readable too. Throws a
// runtime_error that names the op, the block and the thread for whatever a thread did wrong.
// Returns false for sizes that no launch may have.
// A dependent one may overlap its predecessor until it calls dependency_wait.
bool launch(Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(const void*),
            const void* argument, size_t argument_bytes, bool dependent);

struct Limits {
  int architecture, multiprocessors, shared_per_block, shared_per_multiprocessor;
};
// The device that is played: QKERNELS_EMU_ARCHITECTURE (90; 75 to 120) and
// QKERNELS_EMU_MULTIPROCESSORS (132).
Limits limits();

// ---- what a fiber calls ----

void* shared_bytes();
void block_sync();
void warp_sync();
// The 32 lanes meet; the last to come computes out[l] from in[l] for all, in [32] and out [32]
// being what each lane gave. `what` is the same string of all, or the warp has diverged.
using Compute = void (*)(const void* const* in, void* const* out);
void collective(const char* what, const void* in, void* out, Compute compute);

// An explicit access: bounds, alignment, races. Plain loads and stores come here by way of
// hooks.cpp.
enum class Access {
  read,
  read_l2,        // not from L1, which other blocks' writes do not reach
  read_constant,  // by a path that sees no writes of this launch
  write,
  atomic,
};
void access(const void* p, size_t bytes, Access kind);
void device_fence();
void dependency_wait();

void copy_async(void* to, const void* from, int bytes, int valid);
void copy_commit();
void copy_wait(int groups);
void mbarrier_init(uint64_t* barrier);
void mbarrier_expect(uint64_t* barrier, uint32_t bytes);
void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, int parity);

// Ends the launch with this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- numbers ----

float half_to_float(uint16_t bits);
uint16_t float_to_half(float v);
float bf16_to_float(uint16_t bits);
uint16_t float_to_bf16(float v);

}  // namespace qk::emu
