// Plain loads and stores of device code. It is compiled with -fsanitize=thread, which calls one of
// these functions before each access, and -fsanitize=bounds, which calls one for an index outside
// of a local array; the sanitizers themselves are not linked. Host code of the same files calls
// them too, and is let through.
#include "state.h"

using qk::emu::Access;

namespace {
inline void touch(const void* p, size_t bytes, Access kind) {
  if (qk::emu::fiber_runs) qk::emu::access(p, bytes, kind);
}
}  // namespace

#define QK_HOOKS(n)                                                       \
  void __tsan_read##n(void* p) { touch(p, n, Access::read); }             \
  void __tsan_write##n(void* p) { touch(p, n, Access::write); }           \
  void __tsan_unaligned_read##n(void* p) { touch(p, n, Access::read); }   \
  void __tsan_unaligned_write##n(void* p) { touch(p, n, Access::write); } \
  void __tsan_volatile_read##n(void* p) { touch(p, n, Access::read); }    \
  void __tsan_volatile_write##n(void* p) { touch(p, n, Access::write); }

// What std::atomic becomes, in host code only.
#define QK_ATOMIC_HOOKS(n, T)                                                                     \
  T __tsan_atomic##n##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); }           \
  void __tsan_atomic##n##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); }           \
  T __tsan_atomic##n##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); } \
  T __tsan_atomic##n##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); } \
  T __tsan_atomic##n##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, 5); } \
  int __tsan_atomic##n##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {            \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                     \
  }                                                                                               \
  int __tsan_atomic##n##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {              \
    return __atomic_compare_exchange_n(p, e, v, true, 5, 5);                                      \
  }

// What -fsanitize=bounds says of an access, as far as it is used.
struct OutOfBounds {
  const char* file;
  unsigned line, column;
};

extern "C" {
void __ubsan_handle_out_of_bounds(const OutOfBounds* at, unsigned long index) {
  if (qk::emu::fiber_runs)
    qk::emu::fail("index %ld is outside of its array, %s:%u", long(index), at->file, at->line);
}
QK_HOOKS(1)
QK_HOOKS(2)
QK_HOOKS(4)
QK_HOOKS(8)
QK_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, Access::read); }
void __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, Access::write); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
QK_ATOMIC_HOOKS(8, unsigned char)
QK_ATOMIC_HOOKS(32, unsigned)
QK_ATOMIC_HOOKS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(5); }
}
