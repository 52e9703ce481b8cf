// Packed codes (layout.h) as words of four, a byte per code, and words as floats: what unpack,
// dequantize and embedding share. The float32 operations are those of the reference, in its order.
//
// A word is four columns 4 t .. 4 t + 3 of one row of a unit. The lane with (q, t, c) finds eight
// of them, rows 32 q + 16 h + 4 c + e (h < 2, e < 4), in one aligned run of every plane:
//
//   bytes    16 bytes for each h, word e         pairs  8 bytes, word e / 2, bits 4 (e % 2) + 2 h
//   nibbles  16 bytes, word e, bits 4 h          bits   4 bytes, bits 2 e + h
#pragma once
#include "scale.cuh"
#include "words.cuh"

namespace qk {

template <int N>
struct Bits {
  static constexpr int value = N;
};
// Calls f(Bits<bits>).
template <class F>
__device__ __forceinline__ void with_bits(int bits, const F& f) {
  switch (bits) {
    case 8: return f(Bits<8>{});
    case 6: return f(Bits<6>{});
    case 5: return f(Bits<5>{});
    case 4: return f(Bits<4>{});
    case 3: return f(Bits<3>{});
    default: return f(Bits<2>{});
  }
}

// The low `width` bits of every byte of a word.
constexpr uint32_t byte_mask(int width) { return 0x01010101u * ((1u << width) - 1); }

// ORs what one plane of a unit holds of the words of (q, t, c).
template <int kWidth, int kShift>
__device__ __forceinline__ void load_plane(const uint8_t* plane, int q, int t, int c,
                                           uint32_t (&words)[2][4]) {
  constexpr uint32_t mask = byte_mask(kWidth);
  const uint8_t* p = plane + layout::position(kWidth, 32 * q + 4 * c, 4 * t).byte;
  if constexpr (kWidth == 8) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const Words4 run = load_read_only(p + layout::position(8, 16 * h, 0).byte);
#pragma unroll
      for (int e = 0; e < 4; e++) words[h][e] = run.word[e];
    }
  } else if constexpr (kWidth == 4) {
    const Words4 run = load_read_only(p);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) words[h][e] |= (run.word[e] >> (4 * h) & mask) << kShift;
  } else if constexpr (kWidth == 2) {
    const Words2 run = *reinterpret_cast<const Words2*>(p);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        words[h][e] |= (run.word[e / 2] >> (4 * (e % 2) + 2 * h) & mask) << kShift;
  } else {
    const uint32_t run = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) words[h][e] |= (run >> (2 * e + h) & mask) << kShift;
  }
}
// The words [h][e] of (q, t, c) of a unit.
template <int kBits>
__device__ __forceinline__ void load_words(const uint8_t* unit, int q, int t, int c,
                                           uint32_t (&words)[2][4]) {
  constexpr layout::Planes planes = layout::planes(kBits);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int e = 0; e < 4; e++) words[h][e] = 0;
  load_plane<planes.plane[0].width, planes.plane[0].shift>(unit, q, t, c, words);
  if constexpr (planes.count > 1)
    load_plane<planes.plane[1].width, planes.plane[1].shift>(unit + planes.plane[1].offset, q, t, c,
                                                             words);
}

// The word of columns 4 t .. 4 t + 3 of one row of a unit.
template <int kBits>
__device__ __forceinline__ uint32_t load_word(const uint8_t* unit, int row, int t) {
  constexpr layout::Planes planes = layout::planes(kBits);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < planes.count; i++) {
    const layout::Plane plane = planes.plane[i];
    const layout::Position at = layout::position(plane.width, row, 4 * t);
    const auto run = *reinterpret_cast<const uint32_t*>(unit + plane.offset + at.byte);
    word |= (run >> at.shift & byte_mask(plane.width)) << plane.shift;
  }
  return word;
}

// table [16] int8, each value + 128, or nothing where there is no table.
struct ByteTable {
  Words4 values;
  bool used;
};
__device__ __forceinline__ ByteTable load_byte_table(const int8_t* table) {
  ByteTable out{{}, table != nullptr};
  if (table) {
#pragma unroll
    for (int i = 0; i < 16; i++)
      out.values.word[i / 4] |= uint32_t(uint8_t(table[i]) ^ 0x80) << (8 * (i % 4));
  }
  return out;
}
// A word of codes below 16 as a word of their values + 128.
__device__ __forceinline__ uint32_t table_bytes(const ByteTable& table, uint32_t codes) {
  uint32_t selector = (codes | codes >> 4) & 0x00ff00ff;  // 0x0d0c0b0a -> 0x00dc00ba
  selector = (selector | selector >> 8) & 0xffff;         // -> 0xdcba
  const uint32_t* v = table.values.word;
  const uint32_t low = select_bytes(v[0], v[1], selector);
  const uint32_t high = select_bytes(v[2], v[3], selector);
  return select_bytes(low, high, 0x3210 | (selector >> 1 & 0x4444));  // byte i of high: 4 + i
}

// How codes of a group become values: scale * ((2^23 + code) - offset) - minimum. A byte under the
// exponent of 2^23 is the float 2^23 + byte, so offset = 2^23 + zero point, and the difference is
// exact. Taking 0 from a product leaves it as it is.
struct Decoding {
  float scale, offset, minimum;
};
__device__ __forceinline__ Decoding decoding_of(const Weight& w, int64_t n, int64_t g) {
  const GroupScale group = group_scale(w, n, g);
  const bool minimum = w.zero_kind == Zero::minimum;
  const float zero = minimum ? 0.f : w.table ? 128.f : group.zero;
  return {group.scale, 8388608.f + zero, minimum ? group.zero : 0.f};
}
// The eight values of two words of codes (with a table: of what table_bytes makes of them).
__device__ __forceinline__ void decode_octet(const uint32_t (&words)[2], const Decoding& d,
                                             float (&out)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    // Byte j % 4, two zeros, and the 0x4b of 2^23 = 0x4b000000.
    const uint32_t bits = select_bytes(words[j / 4], 0x4b000000, 0x7540 | j % 4);
    out[j] = d.scale * (bits_float(int32_t(bits)) - d.offset) - d.minimum;
  }
}

// Eight values to p, of which the first `count` are inside; `wide`: p is on a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void store_octet(T* p, const float (&v)[8], bool wide, int64_t count) {
  if (wide) {
    constexpr int kPer = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += kPer) {
      float piece[kPer];
#pragma unroll
      for (int j = 0; j < kPer; j++) piece[j] = v[i + j];
      store_128(p + i, pack<T>(piece));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j < count) p[j] = narrow<T>(v[j]);
  }
}

}  // namespace qk
