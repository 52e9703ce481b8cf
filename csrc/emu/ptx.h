// The host version of cuda/ptx.cuh, function for function; the comments there say what each does.
// Only tests include it (QK_EMULATE_CUDA).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emu.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::qk::emu::now.thread)
#define blockIdx (::qk::emu::now.block)
#define blockDim (::qk::emu::now.block_dim)
#define gridDim (::qk::emu::now.grid_dim)
#define __is_same(a, b) (std::is_same_v<a, b>)

using dim3 = qk::emu::Dim3;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "invalid argument";
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  qk::emu::fill(memory, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace qk {

struct half_t {
  uint16_t bits;
  half_t() = default;
  explicit half_t(float v) : bits(emu::float_to_half(v)) {}
  explicit operator float() const { return emu::half_to_float(bits); }
};
struct bf16_t {
  uint16_t bits;
  bf16_t() = default;
  explicit bf16_t(float v) : bits(emu::float_to_bf16(v)) {}
  explicit operator float() const { return emu::bf16_to_float(bits); }
};

struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};

#define QK_SM90 1  // which kernels run is up to the launch: DeviceLimits

// ---- memory ----

template <class T>
T* shared_memory() {
  return static_cast<T*>(emu::shared_bytes());
}
// Explicit accesses: a compiler may split plain ones, whose alignment would then go unchecked.
__attribute__((noinline, no_sanitize("thread"))) inline Words4 load_stream(const void* p) {
  emu::access(p, sizeof(Words4), emu::Access::read);
  return *static_cast<const Words4*>(p);
}
__attribute__((noinline, no_sanitize("thread"))) inline Words4 load_read_only(const void* p) {
  emu::access(p, sizeof(Words4), emu::Access::read_constant);
  return *static_cast<const Words4*>(p);
}
__attribute__((noinline, no_sanitize("thread"))) inline float load_other_block(const float* p) {
  emu::access(p, sizeof(float), emu::Access::read_l2);
  return *p;
}
__attribute__((noinline, no_sanitize("thread"))) inline void store_128(void* p, const Words4& v) {
  emu::access(p, sizeof(Words4), emu::Access::write);
  *static_cast<Words4*>(p) = v;
}

// ---- asynchronous copies ----

template <int kBytes>
void copy_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emu::copy_async(to, from, kBytes, valid);
}
inline void copy_commit() { emu::copy_commit(); }
template <int kGroups>
void copy_wait() {
  emu::copy_wait(kGroups);
}
inline bool bulk_copies() { return emu::limits().architecture >= 90; }
inline void mbarrier_init(uint64_t* barrier) { emu::mbarrier_init(barrier); }
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  emu::mbarrier_expect(barrier, bytes);
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  emu::bulk_load(to, from, bytes, barrier);
}
inline void mbarrier_wait(uint64_t* barrier, int parity) { emu::mbarrier_wait(barrier, parity); }

// ---- threads together ----

inline void block_sync() { emu::block_sync(); }
inline void warp_sync() { emu::warp_sync(); }
inline void device_fence() { emu::device_fence(); }

namespace emu {
template <class T>
struct Shuffled {
  T value;
  int lane;
};
template <class T>
void shuffle_lanes(const void* const* in, void* const* out) {
  for (int l = 0; l < 32; l++) {
    const int from = static_cast<const Shuffled<T>*>(in[l])->lane & 31;
    std::memcpy(out[l], in[from], sizeof(T));  // value is the first member
  }
}
template <class T>
T shuffle(const char* what, T v, int lane) {
  const Shuffled<T> in{v, lane};
  T out;
  collective(what, &in, &out, shuffle_lanes<T>);
  return out;
}
inline int lane() {
  const Dim3 &t = now.thread, &d = now.block_dim;
  return int((t.x + d.x * (t.y + d.y * t.z)) % 32);
}
void mma_half(const void* const* in, void* const* out);
void mma_bf16(const void* const* in, void* const* out);
void mma_u8s8(const void* const* in, void* const* out);
void mma_s8s8(const void* const* in, void* const* out);
void matrices(const void* const* in, void* const* out);
void matrices_transposed(const void* const* in, void* const* out);
void ballot_lanes(const void* const* in, void* const* out);
void max_lanes(const void* const* in, void* const* out);
struct Fragments {
  uint32_t a[4], b[2];
};
}  // namespace emu

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

template <class T>
T shuffle_xor(T v, int mask) {
  return emu::shuffle("shuffle_xor", v, emu::lane() ^ mask);
}
template <class T>
T shuffle(T v, int lane) {
  return emu::shuffle("shuffle", v, lane);
}
inline uint32_t ballot(bool v) {
  uint32_t out;
  emu::collective("ballot", &v, &out, emu::ballot_lanes);
  return out;
}
inline int32_t warp_max(int32_t v) {
  if (emu::now.sm75) return sm75::warp_max(v);
  int32_t out;
  emu::collective("warp_max", &v, &out, emu::max_lanes);
  return out;
}
// No other fiber runs between the check and the change; its own accesses are no plain ones.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T emu_atomic(T* p, const F& change) {
  emu::access(p, sizeof(T), emu::Access::atomic);
  T before, after;
  std::memcpy(&before, p, sizeof(T));
  after = change(before);
  std::memcpy(p, &after, sizeof(T));
  return before;
}
inline void shared_max(int32_t* p, int32_t v) {
  emu_atomic(p, [v](int32_t old) { return old > v ? old : v; });
}
inline int32_t shared_add(int32_t* p, int32_t v) {
  return emu_atomic(p, [v](int32_t old) { return int32_t(uint32_t(old) + uint32_t(v)); });
}
inline uint64_t shared_add(uint64_t* p, uint64_t v) {
  return emu_atomic(p, [v](uint64_t old) { return old + v; });
}
inline uint32_t count_around(uint32_t* p, uint32_t last) {
  return emu_atomic(p, [last](uint32_t old) { return old >= last ? 0 : old + 1; });
}
inline uint32_t global_or(uint32_t* p, uint32_t v) {
  return emu_atomic(p, [v](uint32_t old) { return old | v; });
}
inline void dependency_wait() { emu::dependency_wait(); }
inline void dependency_launch() {}

// ---- matrix products ----

inline void mma_1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const emu::Fragments in{{a0, a1, 0, 0}, {b, 0}};
  emu::collective("mma_1688", &in, d, emu::mma_half);
}
template <bool kSigned>
void mma_8816(int32_t& d0, int32_t& d1, uint32_t a, uint32_t b) {
  const emu::Fragments in{{a, 0, 0, 0}, {b, 0}};
  int32_t d[4] = {d0, d1, 0, 0};
  emu::collective("mma_8816", &in, d, kSigned ? emu::mma_s8s8 : emu::mma_u8s8);
  d0 = d[0], d1 = d[1];
}
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (emu::now.sm75)
    return std::is_same_v<T, bf16_t> ? sm75::mma_bf16(d, a, b0, b1, emu::lane())
                                     : sm75::mma_half(d, a, b0, b1);
  const emu::Fragments in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emu::collective("mma_16816", &in, d, std::is_same_v<T, bf16_t> ? emu::mma_bf16 : emu::mma_half);
}
inline void mma_16832_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (emu::now.sm75) return sm75::mma_bytes<false>(d, a, b0, b1);
  const emu::Fragments in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emu::collective("mma_16832_u8s8", &in, d, emu::mma_u8s8);
}
inline void mma_16832_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (emu::now.sm75) return sm75::mma_bytes<true>(d, a, b0, b1);
  const emu::Fragments in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emu::collective("mma_16832_s8s8", &in, d, emu::mma_s8s8);
}
template <bool kTransposed = false>
void load_matrices(uint32_t (&r)[4], const void* row) {
  emu::access(row, 16, emu::Access::read);
  emu::collective("load_matrices", &row, r, kTransposed ? emu::matrices_transposed : emu::matrices);
}
namespace emu {
inline void transpose_lanes(const void* const* in, void* const* out) {
  const auto element = [&](int row, int column) {
    uint32_t pair;
    std::memcpy(&pair, in[4 * row + column / 2], 4);
    return column % 2 ? pair >> 16 : pair & 0xffff;
  };
  for (int l = 0; l < 32; l++) {
    const int row = l / 4, column = l % 4 * 2;
    const uint32_t pair = element(column, row) | element(column + 1, row) << 16;
    std::memcpy(out[l], &pair, 4);
  }
}
}  // namespace emu
inline uint32_t transpose_matrix(uint32_t v) {
  uint32_t out;
  emu::collective("transpose_matrix", &v, &out, emu::transpose_lanes);
  return out;
}
inline int32_t dot_four(uint32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 32; i += 8) c += int32_t(int8_t(a >> i)) * int32_t(int8_t(b >> i));
  return c;
}

// ---- bits and numbers ----

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | uint64_t(b) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= uint32_t(uint8_t(both >> 8 * (selector >> 4 * i & 7))) << 8 * i;
  return r;
}
inline int32_t float_bits(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float bits_float(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
// Halves to even; as on the GPU NaN is 0, and what passes int32 is its end.
inline int round_int(float v) {
  if (v != v) return 0;
  if (v >= 2147483648.f) return INT32_MAX;
  if (v < -2147483648.f) return INT32_MIN;
  return int(std::nearbyint(v));
}
inline int64_t round_int64(float v) {
  if (v != v) return INT64_MIN;
  if (v >= 9223372036854775808.f) return INT64_MAX;
  if (v < -9223372036854775808.f) return INT64_MIN;
  return int64_t(std::nearbyint(v));
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float inverse_sqrt(float v) { return 1.f / std::sqrt(v); }
inline float exp2_approx(float v) { return std::exp2(v); }
inline float reciprocal_approx(float v) { return 1.f / v; }

template <class T>
float widen(T v) {
  return float(v);
}
template <class T>
T narrow(float v) {
  return T(v);
}
template <class T>
T from_bits(uint16_t bits) {
  T v;
  v.bits = bits;
  return v;
}
template <class T>
uint16_t to_bits(T v) {
  return v.bits;
}
template <class T>
uint32_t narrow_pair(float low, float high) {
  return to_bits(narrow<T>(low)) | uint32_t(to_bits(narrow<T>(high))) << 16;
}
// a * b + c rounded to odd in float32, from which a second rounding to T finds what one alone
// would.
inline float fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;  // of 11 bits each: the product is exact
  const double back = sum - product, lost = (product - (sum - back)) + (c - back);
  float v = float(sum);
  const bool exact = double(v) == sum && lost == 0;
  if (exact || v - v != 0) return v;
  int32_t bits = float_bits(v);
  const double beyond = (double(v) - sum) - lost;        // > 0: v is greater than the exact result
  if (v > 0 ? beyond > 0 : v < 0 && beyond < 0) bits--;  // towards zero
  return bits_float(bits | 1);
}
template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  if (std::is_same_v<T, bf16_t> && emu::now.sm75) return sm75::fma_pair_bf16(a, b, c);
  uint32_t r = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto value = [i](uint32_t w) { return double(widen(from_bits<T>(uint16_t(w >> i)))); };
    const float v = fma_to_odd(value(a), value(b), value(c));
    r |= uint32_t(to_bits(narrow<T>(v))) << i;
  }
  return r;
}

}  // namespace qk
#include "../cuda/ptx_75.cuh"

namespace qk {

// ---- launches ----

using DeviceLimits = emu::Limits;
inline cudaError_t device_limits(DeviceLimits* out) { return *out = emu::limits(), cudaSuccess; }

namespace emu {
template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> parameters;
  static void run(const void* call) {
    const auto* c = static_cast<const Call*>(call);
    std::apply([c](const Parameters&... p) { c->kernel(p...); }, c->parameters);
  }
};
}  // namespace emu

template <class... Parameters, class... Arguments>
cudaError_t launch_with(bool dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        size_t shared_bytes, const Arguments&... arguments) {
  using Call = emu::Call<Parameters...>;
  const Call call{kernel, {Parameters(arguments)...}};
  return emu::launch(grid, block, shared_bytes, Call::run, &call, sizeof call, dependent)
             ? cudaSuccess
             : cudaErrorInvalidConfiguration;
}
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  return launch_with(false, kernel, grid, block, shared_bytes, arguments...);
}
template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                             size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  const bool dependent = emu::limits().architecture >= 90;
  return launch_with(dependent, kernel, grid, block, shared_bytes, arguments...);
}

}  // namespace qk
