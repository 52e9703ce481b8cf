// The packed layout, as constexpr index functions. `qkernels/quant/layout.py` is the same
// definition in PyTorch; tests/test_layout.py holds the two equal.
//
// The unit is 64 rows x 16 columns, and 128 * bits bytes. Units of a 64-row block are contiguous
// along K, blocks are contiguous along N. A unit is one to three planes, the widest first:
//
//   8-bit codes: one plane of bytes           5: a plane of 4 bits, then one of the fifth bit
//   4-bit codes: one plane of nibbles         3: a plane of 2 bits, then one of the third bit
//   6: a plane of 4 bits, then one of 2       2: one plane of 2 bits
//
// With row = 32 q + 16 h + p (q < 2, h < 2, p < 16) and column = 4 t + j (t < 4, j < 4), and
// writing p = 4 c + e:
//
//   bytes    512 h + 256 q + 64 t + 4 p + j
//   nibbles  byte 256 q + 64 t + 4 p + j,                  bits 4 h .. 4 h + 3
//   pairs    byte 128 q + 32 t + 8 c + 4 (e / 2) + j,      bits 4 (e % 2) + 2 h, + 1
//   bits     byte  64 q + 16 t + 4 c + j,                  bit  2 e + h
//
// A CPU vector (q, t) of nibbles is 64 bytes: one row per 32-bit lane, four consecutive columns in
// it, ready for a u8 x s8 dot product against a broadcast of four activations. A GPU lane reads 16
// bytes of nibbles as the A fragments of four row tiles; its pairs are the 8 bytes and its bits the
// 4 bytes with the same (q, t, c).
#pragma once
#include <cstdint>

namespace qk::layout {

constexpr int kUnitRows = 64;
constexpr int kUnitCols = 16;
constexpr int kBlockGroup = 256;  // columns that share one fp16 scale when scales have two levels

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
constexpr int64_t unit_bytes(int bits) { return 128 * bits; }

// Columns after padding: a whole number of groups (and of blocks of 256 when scales have two
// levels).
constexpr int64_t padded_k(int64_t k, int64_t group, bool two_level) {
  return two_level ? round_up(k, kBlockGroup) : round_up(k, group);
}
constexpr int64_t padded_n(int64_t n) { return round_up(n, kUnitRows); }

struct Plane {
  int width;   // bits of the code held here: 8, 4, 2 or 1
  int shift;   // position of those bits in the code
  int offset;  // bytes from the start of the unit
};
struct Planes {
  int count;
  Plane plane[2];
};
constexpr Planes planes(int bits) {
  switch (bits) {
    case 8: return {1, {{8, 0, 0}, {}}};
    case 6: return {2, {{4, 0, 0}, {2, 4, 512}}};
    case 5: return {2, {{4, 0, 0}, {1, 4, 512}}};
    case 4: return {1, {{4, 0, 0}, {}}};
    case 3: return {2, {{2, 0, 0}, {1, 2, 256}}};
    case 2: return {1, {{2, 0, 0}, {}}};
    default: return {0, {}};
  }
}

struct Position {
  int byte;   // within the plane
  int shift;  // within the byte
};
// Where row < 64 and column < 16 of a unit sit in a plane of `width` bits.
constexpr Position position(int width, int row, int col) {
  const int q = row / 32, h = row / 16 % 2, p = row % 16, c = p / 4, e = p % 4, t = col / 4,
            j = col % 4;
  switch (width) {
    case 8: return {512 * h + 256 * q + 64 * t + 4 * p + j, 0};
    case 4: return {256 * q + 64 * t + 4 * p + j, 4 * h};
    case 2: return {128 * q + 32 * t + 8 * c + 4 * (e / 2) + j, 4 * (e % 2) + 2 * h};
    default: return {64 * q + 16 * t + 4 * c + j, 2 * e + h};
  }
}

// Byte offset of unit (n / 64, k / 16); kp is the padded K.
constexpr int64_t unit_offset(int64_t n, int64_t k, int64_t kp, int bits) {
  return (n / kUnitRows * (kp / kUnitCols) + k / kUnitCols) * unit_bytes(bits);
}

// Scales, zeros and minima of groups are [N / 64, K / G, 64], rows in natural order.
constexpr int64_t group_index(int64_t n, int64_t g, int64_t groups) {
  return (n / kUnitRows * groups + g) * kUnitRows + n % kUnitRows;
}

// Every (row, column) has a place of its own in every plane, and together they fill it.
constexpr bool plane_is_bijective(int width) {
  constexpr int codes = kUnitRows * kUnitCols;
  bool seen[codes * 8] = {};
  for (int row = 0; row < kUnitRows; row++)
    for (int col = 0; col < kUnitCols; col++) {
      const Position at = position(width, row, col);
      const int slot = (at.byte * 8 + at.shift) / width;
      if (at.byte >= codes * width / 8 || at.shift % width != 0 || seen[slot]) return false;
      seen[slot] = true;
    }
  return true;
}
static_assert(plane_is_bijective(8) && plane_is_bijective(4) && plane_is_bijective(2) &&
                  plane_is_bijective(1),
              "two codes of a unit share a place");
static_assert(planes(6).plane[1].offset == 128 * 4 && planes(3).plane[1].offset == 128 * 2,
              "a plane starts where the one before it ends");

}  // namespace qk::layout
