// Codes of a unit as the A fragments of int8 products; see linear_int8.cuh for which lane has which.
#pragma once
#include "../layout.h"
#include "ptx.cuh"

namespace qk {

// What a byte of W is. offset: with zero points or minima.
template <int kBits, bool kTable, bool kOffset>
struct Int8Codes {
  static constexpr int bits = kBits, unit_bytes = 128 * kBits;
  static constexpr bool table = kTable, offset = kOffset;
  static constexpr int shift = kTable ? 0 : 8 - kBits;  // of a code in its byte
  static constexpr int wide_bytes = kBits == 8 ? 1024 : kBits >= 4 ? 512 : 0;  // of 16-byte lanes
  // Bytes of two units are 16 registers, which with a code's sums are too many: row tiles 0 and 1
  // are loaded before 2 and 3.
  static constexpr bool in_halves = kBits == 8 && kOffset;
  // Whether there is a kernel for scales per row.
  static constexpr bool rows = !kTable && !kOffset && (kBits == 4 || kBits == 8);
  static_assert(!kTable || (kBits == 4 && !kOffset), "tables have 16 values and no zero");
};

// What a lane needs of a unit, by plane.
template <class C>
struct RawUnit {
  Words4 wide[C::wide_bytes ? C::wide_bytes / 512 : 1];  // bytes: h = 0, 1; nibbles: both
  Words2 pairs;
  uint32_t bits;

  // swizzled: the 16-byte pieces of the wide planes have been moved, see swizzled_piece.
  // Of all row tiles, or, in halves, of 2 kHalf and 2 kHalf + 1.
  template <bool kSwizzled, int kHalf>
  __device__ __forceinline__ void load(const uint8_t* unit, int lane) {
    const int q = lane / 16, c = lane / 4 % 4, t = lane % 4;
    constexpr layout::Planes planes = layout::planes(C::bits);
#pragma unroll
    for (int i = 0; i < planes.count; i++) {
      const uint8_t* plane = unit + planes.plane[i].offset;
      const int width = planes.plane[i].width;
      if (width >= 4) {
        const int piece = 16 * q + 4 * t + (kSwizzled ? c ^ (t & 2) : c);
#pragma unroll
        for (int h = 0; h < (width == 8 ? 2 : 1); h++) {
          const uint8_t* from = plane + 512 * h + 16 * piece;
          if constexpr (C::in_halves) {
            const Words2 two = *reinterpret_cast<const Words2*>(from + 8 * kHalf);
            wide[h].word[2 * kHalf] = two.word[0], wide[h].word[2 * kHalf + 1] = two.word[1];
          } else {
            wide[h] = *reinterpret_cast<const Words4*>(from);
          }
        }
      } else if (width == 2) {
        pairs = *reinterpret_cast<const Words2*>(plane + 128 * q + 32 * t + 8 * c);
      } else {
        bits = *reinterpret_cast<const uint32_t*>(plane + 64 * q + 16 * t + 4 * c);
      }
    }
  }
};

// Eight lanes that read 16 bytes each have pieces 4 t + c with t < 4 and two neighbouring c: banks
// repeat with every second t. Moving pieces with t >= 2 by two lets them all differ.
__device__ __forceinline__ int swizzled_piece(int piece) { return piece ^ (piece >> 2 & 2); }

template <int kBy>
__device__ __forceinline__ uint32_t shift_left(uint32_t v) {
  if constexpr (kBy >= 0) return v << kBy;
  else return v >> -kBy;
}

// The 16 values of a table, four in a word.
struct Int8Table {
  uint32_t word[4];
};
// Of eight nibbles, those of the low halves of the bytes first.
__device__ __forceinline__ void look_up(const Int8Table& table, uint32_t nibbles, uint32_t& low,
                                        uint32_t& high) {
  // Three bits of a nibble select among eight values, the fourth between two such results.
  uint32_t index = nibbles & 0x77777777u, upper = and_or(nibbles >> 1, 0x44444444u, 0x32103210u);
  uint32_t found[2];
#pragma unroll
  for (int i = 0; i < 2; i++, index >>= 16, upper >>= 16)
    found[i] = select_bytes(select_bytes(table.word[0], table.word[1], index),
                            select_bytes(table.word[2], table.word[3], index), upper & 0xffffu);
  low = select_bytes(found[0], found[1], 0x6420);
  high = select_bytes(found[0], found[1], 0x7531);
}

// The codes of row tile kE, rows h = 0 and 1: four columns each.
template <class C, int kE>
__device__ __forceinline__ void decode(const RawUnit<C>& raw, const Int8Table& table, uint32_t& low,
                                       uint32_t& high) {
  if constexpr (C::table) return look_up(table, raw.wide[0].word[kE], low, high);
  constexpr uint32_t turn = C::offset ? 0 : 0x80808080u;
  low = high = turn;
  if constexpr (C::bits == 8) {
    low ^= raw.wide[0].word[kE], high ^= raw.wide[1].word[kE];
  } else if constexpr (C::bits >= 4) {
    constexpr uint32_t mask = (0x0fu << C::shift & 0xffu) * 0x01010101u;
    low = and_xor(shift_left<C::shift>(raw.wide[0].word[kE]), mask, low);
    high = and_xor(shift_left<C::shift - 4>(raw.wide[0].word[kE]), mask, high);
  }
  if constexpr (C::bits == 6 || C::bits < 4) {
    // Bits 4 (e % 2) + 2 h on; the highest of the code, or those below the single one.
    constexpr int to = C::bits == 3 ? 5 : 6, from = 4 * (kE % 2);
    constexpr uint32_t mask = (3u << to) * 0x01010101u;
    low = and_xor(shift_left<to - from>(raw.pairs.word[kE / 2]), mask, low);
    high = and_xor(shift_left<to - from - 2>(raw.pairs.word[kE / 2]), mask, high);
  }
  if constexpr (C::bits == 5 || C::bits == 3) {
    low = and_xor(shift_left<7 - 2 * kE>(raw.bits), 0x80808080u, low);
    high = and_xor(shift_left<6 - 2 * kE>(raw.bits), 0x80808080u, high);
  }
}

}  // namespace qk
