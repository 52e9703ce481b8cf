// 16 bytes as the elements in them.
#pragma once
#include "ptx.cuh"

namespace qk {

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// The 16 / sizeof(T) elements of 16 bytes; T is float, half_t or bf16_t.
template <class T>
__device__ __forceinline__ void unpack(const Words4& words, float (&out)[16 / sizeof(T)]) {
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4) {
      out[w] = bits_float(int32_t(words.word[w]));
    } else {
      out[2 * w] = widen(from_bits<T>(uint16_t(words.word[w])));
      out[2 * w + 1] = widen(from_bits<T>(uint16_t(words.word[w] >> 16)));
    }
  }
}
template <class T>
__device__ __forceinline__ Words4 pack(const float (&in)[16 / sizeof(T)]) {
  Words4 words;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4) words.word[w] = uint32_t(float_bits(in[w]));
    else words.word[w] = narrow_pair<T>(in[2 * w], in[2 * w + 1]);
  }
  return words;
}

}  // namespace qk
