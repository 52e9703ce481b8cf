// The packed layout and its inverse. Both run over items of 64 rows x 256 columns.
#include "decode.h"

namespace qk::QK_ISA {
namespace {

// The codes of 64 rows x 16 columns before they are narrowed, as words of four columns:
// [h][q][t][p], the order of the 8-bit plane.
constexpr int kUnitWords = 256;

// Narrows `words` [h][q][t][p] to one plane of a unit.
template <int Width, int Shift>
QK_INLINE void encode_plane(const uint32_t* words, uint32_t* plane) {
  constexpr uint32_t mask = byte_mask(Width);
  if constexpr (Width == 8) {
    std::memcpy(plane, words, 4 * kUnitWords);
  } else if constexpr (Width == 4) {
    for (int i = 0; i < 128; i++)
      plane[i] = (words[i] >> Shift & mask) | (words[128 + i] >> Shift & mask) << 4;
  } else if constexpr (Width == 2) {
    for (int i = 0; i < 64; i++) {  // word 2 c + e / 2: rows p = 2 i and 2 i + 1 share it
      const uint32_t* low = words + 2 * i;
      const uint32_t* high = low + 128;
      plane[i] = (low[0] >> Shift & mask) | (high[0] >> Shift & mask) << 2 |
                 (low[1] >> Shift & mask) << 4 | (high[1] >> Shift & mask) << 6;
    }
  } else {
    for (int i = 0; i < 32; i++) {  // word c: rows p = 4 i .. 4 i + 3
      uint32_t word = 0;
      for (int e = 0; e < 4; e++)
        word |= (words[4 * i + e] >> Shift & mask) << 2 * e |
                (words[128 + 4 * i + e] >> Shift & mask) << (2 * e + 1);
      plane[i] = word;
    }
  }
}

template <int Bits>
QK_INLINE void pack_item(const PackArgs& a, int64_t n, int64_t begin, int units, uint32_t& seen) {
  constexpr layout::Planes planes = layout::planes(Bits);
  alignas(64) uint32_t words[kChunkUnits * kUnitWords];
  for (int row = 0; row < layout::kUnitRows; row++) {
    alignas(64) uint32_t line[kChunkCols / 4];
    const int64_t left = n + row < a.n ? a.k - begin : 0;
    const int cols = left < 16 * units ? int(left < 0 ? 0 : left) : 16 * units;
    if (cols < 16 * units) std::memset(line, 0, sizeof line);
    if (cols > 0) std::memcpy(line, a.codes + (n + row) * a.k + begin, size_t(cols));
    uint32_t* column = words + layout::position(8, row, 0).byte / 4;
    for (int u = 0; u < units; u++)
      for (int t = 0; t < 4; t++) column[kUnitWords * u + 16 * t] = line[4 * u + t];
  }
  uint8_t* out = a.packed + layout::unit_offset(n, begin, a.kp, Bits);
  for (int u = 0; u < units; u++, out += layout::unit_bytes(Bits)) {
    const uint32_t* unit = words + kUnitWords * u;
    uint32_t all = 0;
    for (int i = 0; i < kUnitWords; i++) all |= unit[i];
    seen |= all;
    alignas(64) uint32_t packed[32 * Bits];
    encode_plane<planes.plane[0].width, planes.plane[0].shift>(unit,
                                                               packed + planes.plane[0].offset / 4);
    if constexpr (planes.count > 1)
      encode_plane<planes.plane[1].width, planes.plane[1].shift>(
          unit, packed + planes.plane[1].offset / 4);
    std::memcpy(out, packed, sizeof packed);
  }
}

// Calls f(first row, first column, units) for this thread's share of the items of 64 rows x 256
// columns.
template <class F>
QK_INLINE void for_items(int64_t n, int64_t kp, const Team& team, F f) {
  const int64_t chunks = (kp + kChunkCols - 1) / kChunkCols,
                blocks = layout::padded_n(n) / layout::kUnitRows;
  const Range share = team.share(blocks * chunks);
  for (int64_t item = share.begin; item < share.end; item++) {
    const int64_t begin = item % chunks * kChunkCols, left = kp - begin;
    f(item / chunks * layout::kUnitRows, begin,
      int((left < kChunkCols ? left : kChunkCols) / layout::kUnitCols));
  }
}

}  // namespace

void pack(const PackArgs& a, Team& team) {
  uint32_t seen = 0;
  with_bits(a.bits, [&](auto bits) __attribute__((always_inline)) {
    for_items(a.n, a.kp, team,
              [&](int64_t n, int64_t begin, int units) __attribute__((always_inline)) {
                pack_item<decltype(bits)::value>(a, n, begin, units, seen);
              });
  });
  __atomic_fetch_or(a.seen, seen, __ATOMIC_RELAXED);
}

void unpack(const UnpackArgs& a, Team& team) {
  const Weight& w = a.w;
  with_bits(w.bits, [&](auto bits) __attribute__((always_inline)) {
    for_items(w.n, w.kp, team,
              [&](int64_t first, int64_t begin, int units) __attribute__((always_inline)) {
                const int64_t end = begin + 16 * units < w.k ? begin + 16 * units : w.k;
                if (begin >= end) return;
                for (int64_t n = first; n < first + layout::kUnitRows && n < w.n; n++) {
                  alignas(64) uint8_t codes[kChunkCols];
                  decode_row<decltype(bits)::value>(w, n, begin, units, codes);
                  std::memcpy(static_cast<uint8_t*>(a.out) + n * w.k + begin, codes,
                              size_t(end - begin));
                }
              });
  });
}

void dequantize(const UnpackArgs& a, Team& team) {
  const Weight& w = a.w;
  with_type(a.out_type, [&](auto io) __attribute__((always_inline)) {
    using T = decltype(io);
    with_bits(w.bits, [&](auto bits) __attribute__((always_inline)) {
      for_items(w.n, w.kp, team,
                [&](int64_t first, int64_t begin, int units) __attribute__((always_inline)) {
                  const int64_t end = begin + 16 * units < w.k ? begin + 16 * units : w.k;
                  if (begin >= end) return;
                  for (int64_t n = first; n < first + layout::kUnitRows && n < w.n; n++)
                    dequantize_row<decltype(bits)::value, T>(
                        w, n, begin, end, 1.f,
                        static_cast<typename T::type*>(a.out) + n * w.k + begin);
                });
    });
  });
}

}  // namespace qk::QK_ISA
