// Scales and zeros of a weight's groups as floats; the float32 operations of the reference, in its
// order, so that decoding is bitwise the same.
#pragma once
#include "../args.h"
#include "../layout.h"
#include "ptx.cuh"

namespace qk {

// 2^(e - 127); 255 is NaN, 0 is the subnormal 2^-127.
__device__ __forceinline__ float e8m0_to_float(uint8_t e) {
  return bits_float(e == 255 ? 0x7fc00000 : e == 0 ? 0x00400000 : int32_t(e) << 23);
}
// Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, all ones is NaN.
__device__ __forceinline__ float e4m3_to_float(uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const int32_t sign = int32_t(uint32_t(b & 0x80) << 24);
  if ((b & 0x7f) == 0x7f) return bits_float(sign | 0x7fc00000);
  if (exponent) return bits_float(sign | (exponent + 120) << 23 | mantissa << 20);
  return bits_float(sign | float_bits(float(mantissa) * 0.001953125f));  // units of 2^-9
}

// Element i of stored flat scales (or minima).
__device__ __forceinline__ float flat_scale(Scale kind, const void* scales, int64_t i) {
  switch (kind) {
    case Scale::f32: return static_cast<const float*>(scales)[i];
    case Scale::f16: return widen(static_cast<const half_t*>(scales)[i]);
    case Scale::bf16: return widen(static_cast<const bf16_t*>(scales)[i]);
    case Scale::e8m0: return e8m0_to_float(static_cast<const uint8_t*>(scales)[i]);
    default: return e4m3_to_float(static_cast<const uint8_t*>(scales)[i]);
  }
}

// What multiplies a value of a group, and what is subtracted: the zero point from the code before,
// or the minimum from the product after (zero_kind minimum).
struct GroupScale {
  float scale, zero;
};

// Of row n (padded rows too: their scales are zero) and group g.
__device__ __forceinline__ GroupScale group_scale(const Weight& w, int64_t n, int64_t g) {
  const int64_t i = layout::group_index(n, g, w.kp / w.group);
  GroupScale out{0.f, w.table ? 0.f : float(1 << (w.bits - 1))};
  if (w.zero_kind == Zero::integer) out.zero = float(static_cast<const uint8_t*>(w.zero)[i]);
  const bool nibbles = w.scale_kind == Scale::two_nibble;
  if (!nibbles && w.scale_kind != Scale::two_level) {
    out.scale = flat_scale(w.scale_kind, w.scale, i);
    if (w.zero_kind == Zero::minimum) out.zero = flat_scale(w.scale_kind, w.zero, i);
    return out;
  }
  const int64_t b =
      layout::group_index(n, g * w.group / layout::kBlockGroup, w.kp / layout::kBlockGroup);
  const uint8_t stored = static_cast<const uint8_t*>(w.scale)[i];
  const int scale = nibbles ? stored & 15 : int(int8_t(stored));
  const auto block = [&](const uint16_t* p) { return widen(from_bits<half_t>(p[b])); };
  out.scale = block(w.block_scale) * float(scale);
  if (w.zero_kind == Zero::minimum) {
    const int minimum = nibbles ? stored >> 4 : static_cast<const int8_t*>(w.zero)[i];
    out.zero = block(w.block_zero) * float(minimum);
  }
  return out;
}

}  // namespace qk
