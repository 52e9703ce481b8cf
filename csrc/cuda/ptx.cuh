// Every instruction and conversion that device code takes from the GPU, behind functions of our
// own: kernels include this and nothing else of CUDA, so that emu/ptx.h, the host version of this
// header, can run them. Both versions have the same functions; a comment here says what each does.
//
// Warp-wide functions are called by all 32 lanes together. Memory is shared between threads through
// block_sync and warp_sync alone: shuffles and matrix products order nothing.
#pragma once
#ifdef QK_EMULATE_CUDA
#include "../emu/ptx.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace qk {

using half_t = __half;
using bf16_t = __nv_bfloat16;

struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

// Blackwell and Hopper: bulk copies with mbarriers, and launches that overlap their predecessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define QK_SM90 1
#else
#define QK_SM90 0
#endif

// Before sm_80 there are no asynchronous copies, and of matrix products only smaller ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define QK_SM80 0
#else
#define QK_SM80 1
#endif

namespace sm75 {  // ptx_75.cuh: what is not there before sm_80
template <int kBytes>
__device__ __forceinline__ void copy(void* to, const void* from, int valid);
__device__ __forceinline__ int32_t warp_max(int32_t v);
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, int lane);
template <bool kSigned>
__device__ __forceinline__ void mma_bytes(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1);
__device__ __forceinline__ uint32_t fma_pair_bf16(uint32_t a, uint32_t b, uint32_t c);
}  // namespace sm75

// ---- memory ----

// The block's shared memory, 128-byte aligned. A kernel lays all of it out in one struct (or takes
// bytes); the launch gives its size.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char qk_shared_bytes[];
  return reinterpret_cast<T*>(qk_shared_bytes);
}
// 16 bytes that are read once: past L1, which then keeps what is read again (weights, statistics).
__device__ __forceinline__ Words4 load_stream(const void* p) {
  Words4 r;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p));
  return r;
}
// 16 bytes that other blocks read too and nobody writes while the kernel runs.
__device__ __forceinline__ Words4 load_read_only(const void* p) {
  Words4 r;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p));
  return r;
}
// 4 bytes that another block has written in this launch: from L2, where it is current.
__device__ __forceinline__ float load_other_block(const float* p) { return __ldcg(p); }
__device__ __forceinline__ void store_128(void* p, const Words4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies into shared memory ----

// kBytes (4, 8 or 16, both sides aligned to them), of which the first `valid` come from `from` and
// the rest is zero; with valid = 0 nothing is read. They are there for this thread after
// copy_wait, for others after a barrier behind it.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if !QK_SM80
  sm75::copy<kBytes>(to, from, valid);
#else
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(to)), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
#endif
}
// Closes this thread's group of copies; copy_wait<N> waits for all groups but the latest N.
__device__ __forceinline__ void copy_commit() {
#if QK_SM80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
#if QK_SM80
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
#endif
}

// Whether the device has bulk copies and mbarriers.
__device__ __forceinline__ bool bulk_copies() { return QK_SM90; }
// mbarriers in shared memory, one arrival per phase: one thread says how many bytes a phase brings
// and issues the copies, any thread waits for the end of the phase of this parity. On sm_80 these
// trap; the launch chooses kernels by the device.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier) {
#if QK_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;"
               :
               : "r"(shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}
// Behind the mbarrier_init of a thread, before the block_sync or warp_sync that tells the others.
__device__ __forceinline__ void mbarrier_init_fence() {
#if QK_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
#if QK_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// bytes, `to` and `from` are multiples of 16. The bytes leave L2 first when it is full: weights are
// read once per step.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
#if QK_SM90
  constexpr uint64_t evict_first = 0x12F0000000000000ull;  // the policy that createpolicy makes
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)),
        "l"(evict_first)
      : "memory");
#endif
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
#if QK_SM90
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT_%=;\n}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
}

// ---- threads together ----

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
// What this thread wrote to global memory is seen by other blocks before what it writes later.
__device__ __forceinline__ void device_fence() { __threadfence(); }
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
// The v of `lane`, which may differ between lanes.
template <class T>
__device__ __forceinline__ T shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
// Bit l of the result: whether lane l says so.
__device__ __forceinline__ uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
__device__ __forceinline__ int32_t warp_max(int32_t v) {
#if QK_SM80
  return __reduce_max_sync(0xffffffffu, v);
#else
  return sm75::warp_max(v);
#endif
}
__device__ __forceinline__ void shared_max(int32_t* p, int32_t v) { atomicMax(p, v); }
__device__ __forceinline__ int32_t shared_add(int32_t* p, int32_t v) { return atomicAdd(p, v); }
__device__ __forceinline__ uint64_t shared_add(uint64_t* p, uint64_t v) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
// In global memory: adds 1 and returns what was there; from `last` it goes to 0, so that a counter
// of last + 1 arrivals is ready for the next launch.
__device__ __forceinline__ uint32_t count_around(uint32_t* p, uint32_t last) {
  return atomicInc(p, last);
}
__device__ __forceinline__ uint32_t global_or(uint32_t* p, uint32_t v) { return atomicOr(p, v); }

// A kernel launched with launch_dependent may start before its predecessor has ended: it reads
// nothing that the predecessor writes, and writes nothing that it reads, before dependency_wait.
// dependency_launch lets the successor start.
__device__ __forceinline__ void dependency_wait() {
#if QK_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void dependency_launch() {
#if QK_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- matrix products ----

// What sm_75 has: halves of k = 8 (a0: rows g, a1: rows g + 8; columns 2 t, + 1), bytes of 8 rows
// and k = 16 (a: row g, columns 4 t, ... + 3; d0, d1: columns 2 t, + 1).
__device__ __forceinline__ void mma_1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
template <bool kSigned>
__device__ __forceinline__ void mma_8816(int32_t& d0, int32_t& d1, uint32_t a, uint32_t b) {
  if constexpr (kSigned)
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d0), "+r"(d1)
        : "r"(a), "r"(b));
  else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d0), "+r"(d1)
        : "r"(a), "r"(b));
}
// d [16, 8] += a [16, 16] b [16, 8], T half_t or bf16_t. With g = lane / 4, t = lane % 4:
//   a[i]: row g + 8 (i % 2), columns 2 t + 8 (i / 2), + 1 (the first in the low half)
//   b[i]: column g, rows 2 t + 8 i, + 1         d[i]: row g + 8 (i / 2), column 2 t + i % 2
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
#if !QK_SM80
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  if constexpr (__is_same(T, bf16_t)) sm75::mma_bf16(d, a, b0, b1, int(thread % 32));
  else sm75::mma_half(d, a, b0, b1);
#else
  if constexpr (sizeof(T) == 2 && !__is_same(T, bf16_t))
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
// d [16, 8] += a [16, 32] b [32, 8] of bytes, a unsigned (or signed), b signed:
//   a[i]: row g + 8 (i % 2), columns 4 t + 16 (i / 2), ... + 3     b[i]: column g, rows 4 t + 16 i,
//   ... + 3
__device__ __forceinline__ void mma_16832_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
#if QK_SM80
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  sm75::mma_bytes<false>(d, a, b0, b1);
#endif
}
__device__ __forceinline__ void mma_16832_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
#if QK_SM80
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  sm75::mma_bytes<true>(d, a, b0, b1);
#endif
}
// Four 8x8 matrices of 16-bit elements: lane 8 i + r gives the address (16-byte aligned, shared) of
// row r of matrix i. r[i] of lane l: row l / 4, columns 2 (l % 4), + 1 of matrix i; with
// kTransposed of its transpose.
template <bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The transpose of an 8x8 matrix of 16-bit elements: lane l gives and gets row l / 4, columns
// 2 (l % 4), + 1 (the first in the low half).
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
// c + the four products of signed bytes.
__device__ __forceinline__ int32_t dot_four(uint32_t a, uint32_t b, int32_t c) {
  return __dp4a(int32_t(a), int32_t(b), c);
}

// ---- bits and numbers ----

// (a & b) | c in one instruction: from C, ptxas makes two.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// (a & b) ^ c in one instruction.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// Byte i of the result: byte number (selector >> 4 i) & 7 of the eight of a (0 to 3) and b.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
__device__ __forceinline__ int32_t float_bits(float v) { return __float_as_int(v); }
__device__ __forceinline__ float bits_float(int32_t v) { return __int_as_float(v); }
__device__ __forceinline__ int round_int(float v) { return __float2int_rn(v); }  // halves to even
__device__ __forceinline__ int64_t round_int64(float v) { return __float2ll_rn(v); }  // the same
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// 1 / sqrt(v), correctly rounded twice; rsqrt.approx would differ from the CPU in the last bit or
// two.
__device__ __forceinline__ float inverse_sqrt(float v) { return __frcp_rn(__fsqrt_rn(v)); }
// 2^v within 2 ulp; 0 for v = -inf.
__device__ __forceinline__ float exp2_approx(float v) {
  float r;
  asm("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// 1 / v within 1 ulp.
__device__ __forceinline__ float reciprocal_approx(float v) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// Conversions of one element; T is float, half_t or bf16_t. Narrowing rounds to nearest even.
template <class T>
__device__ __forceinline__ float widen(T v) {
  if constexpr (sizeof(T) == 4) return v;
  else return float(v);
}
template <class T>
__device__ __forceinline__ T narrow(float v) {
  if constexpr (sizeof(T) == 4) return v;
  else return T(v);
}
template <class T>
__device__ __forceinline__ T from_bits(uint16_t bits) {
  T v;
  __builtin_memcpy(&v, &bits, 2);
  return v;
}
template <class T>
__device__ __forceinline__ uint16_t to_bits(T v) {
  uint16_t bits;
  __builtin_memcpy(&bits, &v, 2);
  return bits;
}
// Two floats to two elements of T in a register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if QK_SM80
  uint32_t r;
  if constexpr (__is_same(T, bf16_t))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return to_bits(narrow<T>(low)) | uint32_t(to_bits(narrow<T>(high))) << 16;
#endif
}
// a * b + c, where the product is exact, rounded to odd: cut off, and the last bit set if that lost
// anything.
__device__ __forceinline__ float fma_to_odd(float a, float b, float c) {
  const int32_t cut = float_bits(__fmaf_rz(a, b, c));
  return bits_float(__fmaf_rd(a, b, c) == __fmaf_ru(a, b, c) ? cut : cut | 1);
}
// a * b + c of two elements of T, rounded once each.
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (__is_same(T, bf16_t)) {
#if QK_SM80
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    return sm75::fma_pair_bf16(a, b, c);
#endif
  } else {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
}

}  // namespace qk
#include "ptx_75.cuh"

namespace qk {

// ---- launches ----

struct DeviceLimits {
  int architecture;  // 75, 80, 90, ...
  int multiprocessors;
  int shared_per_block;  // bytes that a block may have
  int shared_per_multiprocessor;
};
// Of the current device; asked once per device.
inline cudaError_t device_limits(DeviceLimits* out) {
  constexpr int kDevices = 64;
  static DeviceLimits known[kDevices] = {};
  static std::atomic<bool> asked[kDevices];
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  DeviceLimits limits{};
  if (device < kDevices && asked[device].load(std::memory_order_acquire))
    return *out = known[device], cudaSuccess;
  int major = 0, minor = 0;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  for (const cudaError_t error :
       {ask(&major, cudaDevAttrComputeCapabilityMajor),
        ask(&minor, cudaDevAttrComputeCapabilityMinor),
        ask(&limits.multiprocessors, cudaDevAttrMultiProcessorCount),
        ask(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        ask(&limits.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor)})
    if (error != cudaSuccess) return error;
  limits.architecture = 10 * major + minor;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> guard(mutex);
  if (device < kDevices && !asked[device].load()) {
    known[device] = limits;
    asked[device].store(true, std::memory_order_release);
  }
  return *out = limits, cudaSuccess;
}

// Blocks have 48 KB of shared memory unless more is asked for, per kernel and device.
constexpr size_t kSharedWithoutAsking = 48 << 10;

template <class... Parameters, class... Arguments>
cudaError_t launch_with(bool dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > kSharedWithoutAsking) {
    DeviceLimits limits{};
    if (cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
    if (shared_bytes > size_t(limits.shared_per_block)) return cudaErrorInvalidConfiguration;
    // The most there is, not what this launch takes: another thread may be between asking for more
    // and launching the same kernel.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  return launch_with(false, kernel, grid, block, shared_bytes, stream, arguments...);
}
// Whether this kernel, as it runs on the current device, has the instruction of dependency_wait:
// what newer GPUs compile from PTX of sm_80 has not, and must not start early. Asked once.
inline cudaError_t waits_for_dependency(const void* kernel, bool* out) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return *out = found->second, cudaSuccess;
  cudaFuncAttributes attributes{};
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess)
    return error;
  return *out = known[{device, kernel}] = attributes.ptxVersion >= 90, cudaSuccess;
}
// The kernel calls dependency_wait. Before sm_90 it is an ordinary launch.
template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t stream,
                             const Arguments&... arguments) {
  bool waits = false;
  const auto* code = reinterpret_cast<const void*>(kernel);
  if (cudaError_t error = waits_for_dependency(code, &waits); error != cudaSuccess) return error;
  return launch_with(waits, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace qk
#endif
