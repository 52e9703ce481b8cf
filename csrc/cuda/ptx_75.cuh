// What ptx.cuh needs of sm_80 and sm_75 does not have: correct first, and slow where nothing is
// near (bfloat16 products). Made of sm_75's own instructions behind ptx.cuh's functions, so that
// the emulated GPU can run them too. Included by ptx.cuh and emu/ptx.h alone.
#pragma once

namespace qk::sm75 {

// A plain copy, there at once for the thread that made it.
template <int kBytes>
__device__ __forceinline__ void copy(void* to, const void* from, int valid) {
  struct alignas(kBytes) Whole {
    uint32_t word[kBytes / 4];
  };
  if (valid == kBytes) {
    *static_cast<Whole*>(to) = *static_cast<const Whole*>(from);
    return;
  }
  for (int i = 0; i < kBytes; i++)
    static_cast<uint8_t*>(to)[i] = i < valid ? static_cast<const uint8_t*>(from)[i] : 0;
}

__device__ __forceinline__ int32_t warp_max(int32_t v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int32_t other = shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

// k = 16 in two steps of 8: of either, a has two registers and b one.
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  mma_1688(d, a[0], a[1], b0);
  mma_1688(d, a[2], a[3], b1);
}
// Every lane fetches the rows of a and the columns of b of its four sums from the lanes that have
// them, a pair of k at a time.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, int lane) {
  const int row = lane / 4 * 4, column = lane % 4 * 2 * 4;  // first lanes of a row, of a column
  const auto low = [](uint32_t pair) { return bits_float(int32_t(pair << 16)); };
  const auto high = [](uint32_t pair) { return bits_float(int32_t(pair & 0xffff0000u)); };
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const uint32_t b = half ? b1 : b0;
      const uint32_t rows[2] = {shuffle(a[2 * half], row + t), shuffle(a[2 * half + 1], row + t)};
      const uint32_t columns[2] = {shuffle(b, column + t), shuffle(b, column + 4 + t)};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t x = rows[i / 2], y = columns[i % 2];
        d[i] = fma(high(x), high(y), fma(low(x), low(y), d[i]));
      }
    }
}
// Eight rows and 16 of k at a time. a[i]: rows g + 8 (i % 2), k from 16 (i / 2) on.
template <bool kSigned>
__device__ __forceinline__ void mma_bytes(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  mma_8816<kSigned>(d[0], d[1], a[0], b0);
  mma_8816<kSigned>(d[2], d[3], a[1], b0);
  mma_8816<kSigned>(d[0], d[1], a[2], b1);
  mma_8816<kSigned>(d[2], d[3], a[3], b1);
}

// a * b + c of bfloat16 pairs. In float32 the product is exact and the sum rounded to odd, so that
// the second rounding finds what one alone would.
__device__ __forceinline__ uint32_t fma_pair_bf16(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    const auto wide = [](uint32_t bits) { return bits_float(int32_t(bits)); };
    return uint32_t(to_bits(narrow<bf16_t>(fma_to_odd(wide(x), wide(y), wide(z)))));
  };
  const uint32_t high = 0xffff0000u;
  return one(a << 16, b << 16, c << 16) | one(a & high, b & high, c & high) << 16;
}

}  // namespace qk::sm75
