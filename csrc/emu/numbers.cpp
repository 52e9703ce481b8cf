// What the emulated GPU computes: 16-bit floats, and the functions of a whole warp.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ptx.h"

namespace qk::emu {

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31,
                 mantissa = bits & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: units of 2^-24
    const float v = float(mantissa) * 0x1p-24f;
    return sign ? -v : v;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}
uint16_t float_to_half(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(v);
  if (size != size) return 0x7fff;
  if (size >= 65520.f) return uint16_t(sign | 0x7c00);  // halfway to 65536, and to even
  if (size < 0x1p-14f)  // the sum's last place is 2^-24: adding rounds to nearest even
    return uint16_t(sign | (std::bit_cast<uint32_t>(size + 0.5f) & 0x7ff));
  const uint32_t u = std::bit_cast<uint32_t>(size), half = 0xfff + (u >> 13 & 1);
  return uint16_t(sign | ((u + half - (112u << 23)) >> 13));
}
float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
uint16_t float_to_bf16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  if (v != v) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

namespace {

const Fragments& fragments(const void* in) { return *static_cast<const Fragments*>(in); }

// One step of a tensor core, d + the kStep products: all are aligned to the largest, cut off one
// bit below the last that a float of its size has, summed exactly, and the sum is cut to float32.
// That is what Fasi et al. (2021) measured of the A100; of other GPUs more bits or longer steps are
// known, none with larger errors.
constexpr int kStep = 8;
float cut(double v) {
  const float near = float(v);
  if (near - near != 0 || std::fabs(double(near)) <= std::fabs(v)) return near;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(near) - 1);
}
float step(float d, const double* row, const double* column) {
  double terms[kStep + 1], largest = std::fabs(double(d));
  terms[kStep] = d;
  for (int j = 0; j < kStep; j++) {
    terms[j] = row[j] * column[j];  // of 11 bits each: exact
    largest = std::max(largest, std::fabs(terms[j]));
  }
  double sum = 0;
  for (const double term : terms) sum += term;
  if (sum - sum != 0 || largest == 0) return float(sum);  // infinite or NaN
  const auto exponent = int(std::bit_cast<uint64_t>(largest) >> 52) - 1023;
  const auto power = [](int e) { return std::bit_cast<double>(uint64_t(e + 1023) << 52); };
  const double scale = power(24 - exponent);
  int64_t aligned = 0;
  for (const double term : terms) aligned += int64_t(term * scale);
  return cut(double(aligned) * power(exponent - 24));
}

template <class ToFloat>
void mma_floats(const void* const* in, void* const* out, const ToFloat& to_float) {
  double a[16][16], b[8][16];
  for (int l = 0; l < 32; l++) {
    const Fragments& f = fragments(in[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++)
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = to_float(uint16_t(f.a[i] >> 16 * j));
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) b[g][2 * t + 8 * i + j] = to_float(uint16_t(f.b[i] >> 16 * j));
  }
  for (int l = 0; l < 32; l++) {
    auto* d = static_cast<float*>(out[l]);
    for (int i = 0; i < 4; i++) {
      const double* row = a[l / 4 + 8 * (i / 2)];
      const double* column = b[2 * (l % 4) + i % 2];
      for (int k = 0; k < 16; k += kStep) d[i] = step(d[i], row + k, column + k);
    }
  }
}

template <class A>
void mma_bytes(const void* const* in, void* const* out) {
  int a[16][32], b[8][32];
  for (int l = 0; l < 32; l++) {
    const Fragments& f = fragments(in[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++)
        a[g + 8 * (i % 2)][4 * t + 16 * (i / 2) + j] = A(uint8_t(f.a[i] >> 8 * j));
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 4; j++) b[g][4 * t + 16 * i + j] = int8_t(f.b[i] >> 8 * j);
  }
  for (int l = 0; l < 32; l++) {
    auto* d = static_cast<int32_t*>(out[l]);
    for (int i = 0; i < 4; i++) {
      uint32_t sum = uint32_t(d[i]);
      for (int k = 0; k < 32; k++)
        sum += uint32_t(a[l / 4 + 8 * (i / 2)][k] * b[2 * (l % 4) + i % 2][k]);
      d[i] = int32_t(sum);
    }
  }
}

void read_matrices(const void* const* in, void* const* out, bool transposed) {
  uint16_t m[4][8][8];
  for (int i = 0; i < 32; i++) {
    const void* row;
    std::memcpy(&row, in[i], sizeof row);
    std::memcpy(m[i / 8][i % 8], row, 16);
  }
  for (int l = 0; l < 32; l++) {
    auto* r = static_cast<uint32_t*>(out[l]);
    for (int i = 0; i < 4; i++) {
      const int row = l / 4, column = 2 * (l % 4);
      const uint16_t low = transposed ? m[i][column][row] : m[i][row][column];
      const uint16_t high = transposed ? m[i][column + 1][row] : m[i][row][column + 1];
      r[i] = low | uint32_t(high) << 16;
    }
  }
}

}  // namespace

void mma_half(const void* const* in, void* const* out) { mma_floats(in, out, half_to_float); }
void mma_bf16(const void* const* in, void* const* out) { mma_floats(in, out, bf16_to_float); }
void mma_u8s8(const void* const* in, void* const* out) { mma_bytes<uint8_t>(in, out); }
void mma_s8s8(const void* const* in, void* const* out) { mma_bytes<int8_t>(in, out); }
void matrices(const void* const* in, void* const* out) { read_matrices(in, out, false); }
void matrices_transposed(const void* const* in, void* const* out) { read_matrices(in, out, true); }

void ballot_lanes(const void* const* in, void* const* out) {
  uint32_t bits = 0;
  for (int l = 0; l < 32; l++) bits |= uint32_t(*static_cast<const bool*>(in[l])) << l;
  for (int l = 0; l < 32; l++) *static_cast<uint32_t*>(out[l]) = bits;
}
void max_lanes(const void* const* in, void* const* out) {
  int32_t most = INT32_MIN;
  for (int l = 0; l < 32; l++) {
    const int32_t v = *static_cast<const int32_t*>(in[l]);
    most = v > most ? v : most;
  }
  for (int l = 0; l < 32; l++) *static_cast<int32_t*>(out[l]) = most;
}

}  // namespace qk::emu
