// Rows of a packed weight back to codes and floats: what unpack, dequantize and embedding share.
//
// A row owns four 32-bit words in every plane of a unit, one per t (four consecutive columns), all
// at the same shift; so 16 columns are four words per plane, shifted, masked and OR-ed.
#pragma once
#include "../../layout.h"
#include "simd.h"

namespace qk::QK_ISA {
namespace {

constexpr int kChunkCols =
    256;  // columns decoded at a time: codes of 64 rows and a chunk stay in L1
constexpr int kChunkUnits = kChunkCols / layout::kUnitCols;

typedef uint8_t VUB __attribute__((vector_size(W)));
typedef int8_t Bytes16 __attribute__((vector_size(16)));

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls f with bits as a constant: `with_bits(w.bits, [&](auto bits) { ... decltype(bits)::value
// ... })`.
template <class F>
QK_INLINE void with_bits(int bits, F f) {
  switch (bits) {
    case 8: return f(Int<8>{});
    case 6: return f(Int<6>{});
    case 5: return f(Int<5>{});
    case 4: return f(Int<4>{});
    case 3: return f(Int<3>{});
    default: return f(Int<2>{});
  }
}

// The low `width` bits of every byte of a word.
constexpr uint32_t byte_mask(int width) { return 0x01010101u * ((1u << width) - 1); }

// ORs the part of the codes that one plane holds into out [4].
template <int Width, int Offset, int Shift>
QK_INLINE void decode_plane(const uint8_t* unit, int row, uint32_t* out) {
  constexpr int step = layout::position(Width, 0, 4).byte;  // bytes between t and t + 1
  const layout::Position at = layout::position(Width, row, 0);
  for (int t = 0; t < 4; t++) {
    uint32_t word;
    std::memcpy(&word, unit + Offset + at.byte + step * t, 4);
    out[t] |= (word >> at.shift & byte_mask(Width)) << Shift;
  }
}

// Codes of columns [begin, begin + 16 * units) of row n, one per byte; begin is a multiple of 16.
template <int Bits>
QK_INLINE void decode_row(const Weight& w, int64_t n, int64_t begin, int units, uint8_t* codes) {
  constexpr layout::Planes planes = layout::planes(Bits);
  const int row = int(n % layout::kUnitRows);
  const uint8_t* unit = w.codes + layout::unit_offset(n, begin, w.kp, Bits);
  for (int u = 0; u < units; u++, unit += layout::unit_bytes(Bits)) {
    uint32_t word[4] = {};
    decode_plane<planes.plane[0].width, planes.plane[0].offset, planes.plane[0].shift>(unit, row,
                                                                                       word);
    if constexpr (planes.count > 1)
      decode_plane<planes.plane[1].width, planes.plane[1].offset, planes.plane[1].shift>(unit, row,
                                                                                         word);
    std::memcpy(codes + layout::kUnitCols * u, word, layout::kUnitCols);
  }
}

// 2^(e - 127); 255 is NaN, 0 is the subnormal 2^-127.
QK_INLINE float e8m0_to_float(uint8_t e) {
  const uint32_t u = e == 255 ? 0x7fc00000 : e == 0 ? 0x00400000 : uint32_t(e) << 23;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, all ones is NaN.
QK_INLINE float e4m3_to_float(uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const float subnormal = float(mantissa) * 0.001953125f;  // units of 2^-9
  uint32_t u;
  std::memcpy(&u, &subnormal, 4);
  if (exponent) u = uint32_t(exponent + 120) << 23 | uint32_t(mantissa) << 20;
  if ((b & 0x7f) == 0x7f) u = 0x7fc00000;
  u |= uint32_t(b & 0x80) << 24;  // as bits, so that -0 stays
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// What multiplies a value of a group and what is subtracted: the zero point before, or the minimum
// after.
struct GroupScale {
  float scale, zero;
};

QK_INLINE float flat_scale(Scale kind, const void* scales, int64_t i) {
  switch (kind) {
    case Scale::f32: return static_cast<const float*>(scales)[i];
    case Scale::f16: return half_to_float(static_cast<const uint16_t*>(scales)[i]);
    case Scale::bf16: return bf16_to_float(static_cast<const uint16_t*>(scales)[i]);
    case Scale::e8m0: return e8m0_to_float(static_cast<const uint8_t*>(scales)[i]);
    default: return e4m3_to_float(static_cast<const uint8_t*>(scales)[i]);
  }
}

QK_INLINE GroupScale group_scale(const Weight& w, int64_t n, int64_t g) {
  const int64_t i = layout::group_index(n, g, w.kp / w.group);
  const bool two_level = w.scale_kind == Scale::two_level || w.scale_kind == Scale::two_nibble;
  GroupScale out{0.f, w.table ? 0.f : float(1 << (w.bits - 1))};
  if (w.zero_kind == Zero::integer) out.zero = float(static_cast<const uint8_t*>(w.zero)[i]);
  if (!two_level) {
    out.scale = flat_scale(w.scale_kind, w.scale, i);
    if (w.zero_kind == Zero::minimum) out.zero = flat_scale(w.scale_kind, w.zero, i);
    return out;
  }
  const int64_t b =
      layout::group_index(n, g * w.group / layout::kBlockGroup, w.kp / layout::kBlockGroup);
  int scale, minimum = 0;
  if (w.scale_kind == Scale::two_nibble) {
    const uint8_t pair = static_cast<const uint8_t*>(w.scale)[i];
    scale = pair & 15, minimum = pair >> 4;
  } else {
    scale = static_cast<const int8_t*>(w.scale)[i];
    if (w.zero_kind == Zero::minimum) minimum = static_cast<const int8_t*>(w.zero)[i];
  }
  out.scale = half_to_float(w.block_scale[b]) * float(scale);
  if (w.zero_kind == Zero::minimum) out.zero = half_to_float(w.block_zero[b]) * float(minimum);
  return out;
}

// Columns [begin, end) of row n into out, times multiplier (1 changes nothing); begin is a multiple
// of 16, at most kChunkCols columns. Every operation is one IEEE float32 operation in the order
// that the definition gives, so the result is bitwise that of the reference: hence no fma() here.
template <int Bits, class T>
QK_INLINE void dequantize_row(const Weight& w, int64_t n, int64_t begin, int64_t end,
                              float multiplier, typename T::type* out) {
  alignas(64) uint8_t codes[kChunkCols];
  const int units = int((end - begin + layout::kUnitCols - 1) / layout::kUnitCols);
  decode_row<Bits>(w, n, begin, units, codes);
  if (Bits == 4 && w.table) {
    const Bytes16 table = load_raw<Bytes16>(w.table);
    for (int u = 0; u < units; u++) {
      const Bytes16 index = load_raw<Bytes16>(codes + 16 * u);
      store_raw(codes + 16 * u, __builtin_shuffle(table, index));
    }
  }
  const bool signed_codes = Bits == 4 && w.table, minimum = w.zero_kind == Zero::minimum;
  const VF factor = splat(multiplier);
  for (int64_t col = begin; col < end;) {
    const int64_t g = col / w.group, group_end = (g + 1) * w.group,
                  stop = group_end < end ? group_end : end;
    const GroupScale gs = group_scale(w, n, g);
    const VF scale = splat(gs.scale), zero = splat(gs.zero);
    for (; col < stop; col += W) {
      const uint8_t* p = codes + (col - begin);
      const VF v = signed_codes ? load_i8((const int8_t*)p)
                                : to_float(__builtin_convertvector(load_raw<VUB>(p), VI));
      const VF y = (minimum ? scale * v - zero : scale * (v - zero)) * factor;
      if (col + W <= end) {
        T::store(out + (col - begin), y);
      } else {
        for (int i = 0; col + i < end; i++) T::put(out + (col - begin) + i, y[i]);
      }
    }
    if (col > stop) col = stop;
  }
}

}  // namespace
}  // namespace qk::QK_ISA
