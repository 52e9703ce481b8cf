// The integer dot product of AVX-512 VNNI, and its lowering to AVX2.
#pragma once
#include "simd.h"

#if defined(QK_ISA_AVX512)

namespace qk::QK_ISA {
namespace {

// acc + four u8 x s8 products per lane, without saturation.
QK_HOT VI dot_four(VI acc, VI codes, VI x) {
#if defined(QK_NATIVE_AVX512)
  return (VI)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#else
  // Even and odd bytes as 16-bit words; the products of two words are added in 32 bits.
  typedef int16_t VS __attribute__((vector_size(4 * W)));
  typedef uint16_t VW __attribute__((vector_size(4 * W)));
  const VS parts[4] = {(VS)((VW)codes & 255), (VS)x << 8 >> 8, (VS)((VW)codes >> 8), (VS)x >> 8};
  const __m256i* half = (const __m256i*)parts;
  for (int i = 0; i < 2; i++) {
    const __m256i even =
        _mm256_madd_epi16(_mm256_loadu_si256(half + i), _mm256_loadu_si256(half + 2 + i));
    const __m256i odd =
        _mm256_madd_epi16(_mm256_loadu_si256(half + 4 + i), _mm256_loadu_si256(half + 6 + i));
    __m256i* to = (__m256i*)&acc + i;
    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_add_epi32(even, odd)));
  }
  return acc;
#endif
}

}  // namespace
}  // namespace qk::QK_ISA

#endif
