// From the packed units of a weight (layout.h) to the operands of tensor cores.
//
// A lane l of a warp, with q = l / 16, c = l / 4 % 4 and t = l % 4, reads of every plane of a unit
// the bytes that hold
//
//   rows 32 q + 16 h + 4 c + e  (h < 2, e < 4),  columns 4 t + j  (j < 4)
//
// For a fixed e these are rows g = l / 4 (h = 0) and g + 8 (h = 1) of an m16 fragment: a unit is
// four row tiles e that share one B fragment, and a lane ends with four consecutive rows per h.
#pragma once
#include "../args.h"
#include "../layout.h"
#include "ptx.cuh"

namespace qk {

// A kind of codes as kernels tell them apart: the width, and whether a code is an index into the
// table of 16 values.
template <int kBits, bool kTable = false>
struct Codes {
  static constexpr int bits = kBits;
  static constexpr bool table = kTable;
  static constexpr layout::Planes planes = layout::planes(kBits);
  static constexpr int unit_bytes = 128 * kBits;
  static_assert(!kTable || kBits == 4, "tables have 16 values");
};

// The first plane's words of a lane, then the second's: 8 bits: [h][e]; 4: [e]; 2: [e / 2]; 1: one.
constexpr int lane_words(int width) { return width == 8 ? 8 : width == 1 ? 1 : width; }
template <class C>
struct LaneUnit {
  uint32_t wide[lane_words(C::planes.plane[0].width)];
  uint32_t fine[C::planes.count > 1 ? lane_words(C::planes.plane[1].width) : 1];
};

// Of a lane in a plane of `width` bits: its first byte.
template <int kWidth>
__device__ __forceinline__ int lane_byte(int lane) {
  const int q = lane / 16, c = lane / 4 % 4, t = lane % 4;
  constexpr int width = kWidth == 8 ? 4 : kWidth;  // bytes of h = 1 come 512 further
  return 64 * width * q + 16 * width * t + 4 * width * c;
}
template <int kWidth>
__device__ __forceinline__ void load_plane(const uint8_t* plane, int lane,
                                           uint32_t (&out)[lane_words(kWidth)]) {
  const uint8_t* p = plane + lane_byte<kWidth>(lane);
  if constexpr (kWidth >= 4) {
#pragma unroll
    for (int h = 0; h < lane_words(kWidth) / 4; h++) {
      const Words4 v = *reinterpret_cast<const Words4*>(p + 512 * h);
#pragma unroll
      for (int e = 0; e < 4; e++) out[4 * h + e] = v.word[e];
    }
  } else if constexpr (kWidth == 2) {
    const Words2 v = *reinterpret_cast<const Words2*>(p);
    out[0] = v.word[0], out[1] = v.word[1];
  } else {
    out[0] = *reinterpret_cast<const uint32_t*>(p);
  }
}
// `unit`: 128 * bits bytes of shared (or global) memory, 16-byte aligned.
template <class C>
__device__ __forceinline__ LaneUnit<C> load_unit(const uint8_t* unit, int lane) {
  LaneUnit<C> u{};
  load_plane<C::planes.plane[0].width>(unit, lane, u.wide);
  if constexpr (C::planes.count > 1)
    load_plane<C::planes.plane[1].width>(unit + C::planes.plane[1].offset, lane, u.fine);
  return u;
}

// The bits [at, at + width) of every byte, moved to `to` (and what else the mask lets through: the
// caller masks).
template <int kAt, int kTo>
__device__ __forceinline__ uint32_t move_bits(uint32_t word) {
  if constexpr (kAt > kTo) return word >> (kAt - kTo);
  else return word << (kTo - kAt);
}
constexpr uint32_t every_byte(int byte) { return 0x01010101u * uint32_t(byte); }

// The codes of columns 4 t .. 4 t + 3, a byte each, of row tile kE and half kH.
template <int kE, int kH, class C>
__device__ __forceinline__ uint32_t code_bytes(const LaneUnit<C>& u) {
  constexpr layout::Plane wide = C::planes.plane[0], fine = C::planes.plane[1];
  if constexpr (wide.width == 8) {
    return u.wide[4 * kH + kE];
  } else {
    constexpr int at = wide.width == 4 ? 4 * kH : 4 * (kE % 2) + 2 * kH;
    uint32_t codes =
        move_bits<at, 0>(u.wide[wide.width == 4 ? kE : kE / 2]) & every_byte((1 << wide.width) - 1);
    if constexpr (C::planes.count > 1) {
      constexpr int fine_at = fine.width == 2 ? 4 * (kE % 2) + 2 * kH : 2 * kE + kH;
      codes = and_or(move_bits<fine_at, fine.shift>(u.fine[fine.width == 2 ? kE / 2 : 0]),
                     every_byte(((1 << fine.width) - 1) << fine.shift), codes);
    }
    return codes;
  }
}

// The table of 16 int8 values as look_up takes it, and its values for the 8 nibbles of a word of a
// nibble plane: of the low nibbles (h = 0) and of the high ones. A permute of bytes chooses among
// 8, by 3 bits; the fourth chooses between two of them. The sign bits are flipped: bytes value +
// 128.
struct TableWords {
  uint32_t word[4];
};
__device__ __forceinline__ TableWords load_table(const int8_t* table /* [16] */) {
  TableWords t;
#pragma unroll
  for (int i = 0; i < 4; i++) t.word[i] = reinterpret_cast<const uint32_t*>(table)[i] ^ 0x80808080u;
  return t;
}
__device__ __forceinline__ void look_up(const TableWords& t, uint32_t nibbles,
                                        uint32_t (&values)[2]) {
  const uint32_t among = nibbles & 0x77777777u;
  const uint32_t upper = and_or(nibbles >> 1, 0x44444444u, 0x32103210u);  // byte i of two words
  uint32_t pairs[2];  // of bytes 0 and 1 of `nibbles`, then of 2 and 3: low, high, low, high
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t low = select_bytes(t.word[0], t.word[1], among >> 16 * i);
    const uint32_t high = select_bytes(t.word[2], t.word[3], among >> 16 * i);
    pairs[i] = select_bytes(low, high, upper >> 16 * i);
  }
  values[0] = select_bytes(pairs[0], pairs[1], 0x6420);
  values[1] = select_bytes(pairs[0], pairs[1], 0x7531);
}

}  // namespace qk
