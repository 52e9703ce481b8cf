// How the packed layout becomes vectors of codes: one row per 32-bit lane, four columns in it.
//
// A piece is one vector of 4 W bytes of the layout's byte or nibble plane: W rows x 4 columns. A
// piece of bytes holds one row vector. Narrower codes have two of them, rows r .. r + W - 1 and
// r + 16 .., in the low and the high slots of the same bytes; their planes of 2 bits and of 1 bit
// have the same rows in half and in a quarter of the bytes. Pieces are numbered so that half a
// block (32 rows, the unit in which threads share a matrix) is a contiguous range of them, and so
// that the offsets of pieces first .. first + P - 1 do not depend on `first` when P (a power of
// two) divides it.
#pragma once
#include "simd.h"

#include "../../layout.h"

namespace qk::QK_ISA {
namespace {

typedef uint8_t VC __attribute__((vector_size(4 * W)));   // codes: W rows x 4 columns
typedef uint16_t VW __attribute__((vector_size(4 * W)));  // the same bits as words
typedef uint8_t Levels __attribute__((vector_size(16)));  // a value per 4-bit code

// A kind of codes as the kernels tell them apart: the width, and whether a code is an index.
template <int Bits, bool Table>
struct Codes {
  static constexpr int bits = Bits;
  static constexpr bool table = Table;
  static constexpr int vectors = Bits == 8 ? 1 : 2;       // row vectors in a piece
  static constexpr int half_pieces = 32 / (W * vectors);  // pieces in 32 rows
  static constexpr layout::Planes planes = layout::planes(Bits);
};

// Offset of a piece in the plane of `width` bits of its unit, for columns 0 .. 3; those of columns
// 4 t .. 4 t + 3 are `plane_step` t further.
constexpr int piece_byte(int width, int piece) {
  constexpr int run = 16 / W;  // pieces in 64 contiguous bytes
  if (width == 8) return piece / run % 2 * 512 + piece / (2 * run) * 256 + piece % run * 4 * W;
  return (piece / run * 256 + piece % run * 4 * W) * width / 4;
}
constexpr int plane_step(int width) { return width == 8 ? 64 : 16 * width; }

// First row, in the 64 of a block, of row vector `v` of a piece.
template <class C>
constexpr int piece_row(int piece, int v) {
  constexpr int run = 16 / W;
  return C::vectors == 2 ? piece / run * 32 + v * 16 + piece % run * W : piece * W;
}

// Where lane `lane` of a piece of bits and pairs finds its byte (a word holds 4 or 2 lanes), and by
// how much more than v * width that byte is shifted.
constexpr int lane_word(int width, int lane) { return width >= 4 ? lane : lane * width / 4; }
constexpr int lane_shift(int width, int lane) {
  return width >= 4 ? 0 : 2 * width * (lane % (4 / width));
}

// Every byte, shift and row that a piece claims is where layout.h has it.
template <class C>
constexpr bool pieces_match_layout() {
  for (int plane = 0; plane < C::planes.count; plane++)
    for (int piece = 0; piece < 2 * C::half_pieces; piece++)
      for (int v = 0; v < C::vectors; v++)
        for (int lane = 0; lane < W; lane++)
          for (int col = 0; col < 16; col++) {
            const int width = C::planes.plane[plane].width;
            const layout::Position at = layout::position(width, piece_row<C>(piece, v) + lane, col);
            if (at.byte != piece_byte(width, piece) + plane_step(width) * (col / 4) +
                               4 * lane_word(width, lane) + col % 4 ||
                at.shift != width * v + lane_shift(width, lane))
              return false;
          }
  return true;
}
static_assert(pieces_match_layout<Codes<2, false>>() && pieces_match_layout<Codes<3, false>>() &&
                  pieces_match_layout<Codes<4, false>>() &&
                  pieces_match_layout<Codes<5, false>>() &&
                  pieces_match_layout<Codes<6, false>>() && pieces_match_layout<Codes<8, false>>(),
              "pieces do not follow the packed layout");

// The words of a plane for the W rows of a piece, so that the bits of row vector v are v * width up
// in every byte; what is above them is anything.
template <int Width>
QK_INLINE VU load_plane(const uint8_t* p) {
  if constexpr (Width >= 4) {
    return load_raw<VU>(p);
#if defined(QK_NATIVE_AVX512)
  } else if constexpr (Width == 2) {
    const __m512i wide = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)p));
    return (VU)_mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));  // the upper word: >> 4
  } else {
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i shift = _mm512_set_epi32(6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0);
    const __m512i words = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    return (VU)_mm512_srlv_epi32(_mm512_permutexvar_epi32(lane, words), shift);
#elif defined(QK_ISA_AVX2)
  } else if constexpr (Width == 2) {
    const __m256i wide = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)p));
    return (VU)_mm256_or_si256(wide, _mm256_slli_epi64(wide, 28));  // the upper word: >> 4
  } else {
    const __m256i lane = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    const __m256i shift = _mm256_set_epi32(6, 4, 2, 0, 6, 4, 2, 0);
    const __m256i words = _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)p));
    return (VU)_mm256_srlv_epi32(_mm256_permutevar8x32_epi32(words, lane), shift);
#else
  } else {
    VU out;
    for (int lane = 0; lane < W; lane++)
      out[lane] = load_raw<uint32_t>(p + 4 * lane_word(Width, lane)) >> lane_shift(Width, lane);
    return out;
#endif
  }
}

constexpr uint32_t every_byte(uint32_t byte) { return 0x01010101u * byte; }

// A piece of a unit (planes: its first byte in each plane; z: pieces from there; t: columns
// 4 t ..) before row vectors are told apart.
template <class C>
struct RawPiece {
  VU plane[2];
};
template <class C>
QK_INLINE RawPiece<C> load_piece(const uint8_t* const (&planes)[2], int z, int t) {
  constexpr layout::Planes all = C::planes;
  RawPiece<C> raw;
  raw.plane[0] = load_plane<all.plane[0].width>(planes[0] + piece_byte(all.plane[0].width, z) +
                                                plane_step(all.plane[0].width) * t);
  if constexpr (all.count > 1)
    raw.plane[1] = load_plane<all.plane[1].width>(planes[1] + piece_byte(all.plane[1].width, z) +
                                                  plane_step(all.plane[1].width) * t);
  return raw;
}
// The codes of its row vector v.
template <class C>
QK_INLINE VC piece_codes(const RawPiece<C>& raw, int v) {
  constexpr layout::Planes all = C::planes;
  constexpr int low = all.plane[0].width, high = all.plane[1].width;
  if constexpr (low == 8) return (VC)raw.plane[0];
  VU codes = raw.plane[0] >> (low * v) & every_byte((1u << low) - 1);
  if constexpr (all.count > 1)
    codes |= raw.plane[1] << (all.plane[1].shift - high * v) &
             every_byte(((1u << high) - 1) << all.plane[1].shift);
  return (VC)codes;
}

// levels[code] in every byte.
QK_INLINE VC look_up(Levels levels, VC codes) {
#if defined(QK_NATIVE_AVX512)
  return (VC)_mm512_shuffle_epi8(_mm512_broadcast_i32x4((__m128i)levels), (__m512i)codes);
#elif defined(QK_ISA_AVX2)
  return (VC)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)levels), (__m256i)codes);
#else
  VC out;
  for (int i = 0; i < W / 4; i++) {
    const Levels part = __builtin_shuffle(levels, load_raw<Levels>((const char*)&codes + 16 * i));
    std::memcpy((char*)&out + 16 * i, &part, 16);
  }
  return out;
#endif
}

// First bytes of piece `first` in the planes of the unit at w.
template <class C>
QK_INLINE void piece_planes(const uint8_t* w, int first, const uint8_t* (&planes)[2]) {
  for (int i = 0; i < 2; i++)
    planes[i] = w + C::planes.plane[i].offset + piece_byte(C::planes.plane[i].width, first);
}

}  // namespace
}  // namespace qk::QK_ISA
