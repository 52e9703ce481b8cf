// Rows of K and V as they are stored, loaded as float vectors: one type per kind of page.
#pragma once
#include "simd.h"

namespace qk::QK_ISA {
namespace {

constexpr int kDims = 16;  // head dimensions are multiples of 16; loaders address groups of 16
constexpr int kVecs = kDims / W;

typedef uint8_t VUB __attribute__((vector_size(W)));

// Storage types of K and V rows: load(row, c, j) gives dims 16 c + W j ... + W - 1 as floats (codes
// unscaled).
template <Dtype T>
struct FloatRow {
  static constexpr bool integer = false, is_float32 = T == Dtype::f32;
  static int64_t bytes(int64_t dim) { return dim * int64_t(sizeof(typename Io<T>::type)); }
  static QK_INLINE VF load(const char* row, int64_t c, int j) {
    return Io<T>::load(reinterpret_cast<const typename Io<T>::type*>(row) + kDims * c + W * j);
  }
};
// W bytes -> W lanes. GCC 12 takes vectors of 8 bytes apart one by one, hence the instruction by
// name.
QK_INLINE VI widen(const char* p) {
#if defined(QK_ISA_AVX2)
  return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load_raw<VUB>(p), VI);
#endif
}
struct Int8Row {
  static constexpr bool integer = true, is_float32 = false;
  static constexpr int bits = 8;
  static int64_t bytes(int64_t dim) { return dim; }
  static QK_INLINE VF load(const char* row, int64_t c, int j) {
    return to_float(widen(row + kDims * c + W * j));
  }
};
struct Int4Row {  // 8 bytes per 16 dims: dims 0..7 in the low nibbles, 8..15 in the high ones
  static constexpr bool integer = true, is_float32 = false;
  static constexpr int bits = 4;
  static int64_t bytes(int64_t dim) { return dim / 2; }
  static QK_INLINE VF load(const char* row, int64_t c, int j) {
    const char* p = row + kDims / 2 * c;
    constexpr int half = W == 16 ? 1 : kVecs / 2;  // vectors of low nibbles; 16 lanes never ask
    const VI bytes = widen(p + W * (j % half));
    return to_float(j < half ? bytes & 15 : bytes >> 4);
  }
};

template <class F>
QK_INLINE void with_rows(KvType type, F f) {
  switch (type) {
    case KvType::f32: return f(FloatRow<Dtype::f32>{});
    case KvType::f16: return f(FloatRow<Dtype::f16>{});
    case KvType::bf16: return f(FloatRow<Dtype::bf16>{});
    case KvType::int8: return f(Int8Row{});
    case KvType::int4: return f(Int4Row{});
  }
}

}  // namespace
}  // namespace qk::QK_ISA
