// Codes to the packed layout and back, and to floats.
//
// unpack and dequantize: a warp takes 64 rows x 64 columns. Lane 4 o + c has the eight columns from
// 8 o on (t = 2 (o % 2) and t + 1 of unit o / 2) of rows 32 q + 16 h + 4 c + e, for q = 0, then 1.
// It reads every plane in runs of 16 bytes (pairs: 8, bits: 4), of which the four c make whole
// sectors, and writes eight columns at once: 16 bytes of 16-bit floats, four rows of 128 bytes per
// instruction. So nothing needs to pass through shared memory.
//
// pack: a warp takes 64 rows x 32 columns, lane 4 o + c the four columns from 4 o on: it reads
// them row by row, four rows of 32 bytes per instruction, and writes the same runs.
//
// A block has 16,384 codes or more, so 2^31 blocks are more codes than any memory holds.
#pragma once
#include "../args.h"
#include "decode.cuh"

namespace qk {

constexpr int kPackThreads = 256;

// Where a warp and its lane are: rows [first, first + 64), this lane's first column.
struct PackPlace {
  int64_t first, col;
  int c;
};
template <int kCols>
__device__ __forceinline__ PackPlace pack_place(int64_t columns) {
  const int64_t warp = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  const int64_t chunks = (columns + kCols - 1) / kCols, block = warp / chunks;
  const int lane = threadIdx.x % 32;
  return {block * layout::kUnitRows, (warp - block * chunks) * kCols + lane / 4 * (kCols / 8),
          lane % 4};
}

// Calls f(row, words [2]) for the rows of this lane: the codes of eight columns from place.col on.
template <class F>
__device__ __forceinline__ void each_octet(const Weight& w, const PackPlace& place, const F& f) {
  const int t = int(place.col % layout::kUnitCols) / 4;
  const uint8_t* unit = w.codes + layout::unit_offset(place.first, place.col, w.kp, w.bits);
#pragma unroll 1
  for (int q = 0; q < 2; q++) {
    uint32_t left[2][4], right[2][4];
    with_bits(w.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      load_words<kBits>(unit, q, t, place.c, left);
      load_words<kBits>(unit, q, t + 1, place.c, right);
    });
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t row = place.first + 32 * q + 16 * h + 4 * place.c + e;
        const uint32_t words[2] = {left[h][e], right[h][e]};
        if (row < w.n) f(row, words);
      }
  }
}

// `wide`: rows of out start on multiples of 16 bytes, and have whole octets.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    dequantize_kernel(const UnpackArgs args, const bool wide) {
  const Weight& w = args.w;
  const PackPlace place = pack_place<64>(w.k);
  if (place.first >= w.n || place.col >= w.k) return;
  const ByteTable table = load_byte_table(w.table);
  const int64_t group = place.col / w.group;
  each_octet(w, place, [&](int64_t row, const uint32_t (&codes)[2]) {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) words[i] = table.used ? table_bytes(table, codes[i]) : codes[i];
    float v[8];
    decode_octet(words, decoding_of(w, row, group), v);
    store_octet(static_cast<T*>(args.out) + row * w.k + place.col, v, wide, w.k - place.col);
  });
}

// `wide`: rows of out start on multiples of 8 bytes, and have whole octets.
inline __global__ void __launch_bounds__(kPackThreads)
    unpack_kernel(const UnpackArgs args, const bool wide) {
  const Weight& w = args.w;
  const PackPlace place = pack_place<64>(w.k);
  if (place.first >= w.n || place.col >= w.k) return;
  each_octet(w, place, [&](int64_t row, const uint32_t (&words)[2]) {
    uint8_t* p = static_cast<uint8_t*>(args.out) + row * w.k + place.col;
    if (wide) {
      *reinterpret_cast<Words2*>(p) = {{words[0], words[1]}};
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (place.col + j < w.k) p[j] = uint8_t(words[j / 4] >> (8 * (j % 4)));
    }
  });
}

// The run of (q, t, c) in one plane, from its words [h][e]: the inverse of load_plane.
template <int kWidth, int kShift>
__device__ __forceinline__ void store_plane(uint8_t* plane, int q, int t, int c,
                                            const uint32_t (&words)[2][4]) {
  constexpr uint32_t mask = byte_mask(kWidth);
  uint8_t* p = plane + layout::position(kWidth, 32 * q + 4 * c, 4 * t).byte;
  if constexpr (kWidth == 8) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      store_128(p + layout::position(8, 16 * h, 0).byte,
                {{words[h][0], words[h][1], words[h][2], words[h][3]}});
  } else {
    constexpr int kWords = kWidth;  // four rows to a word of bits, two of pairs, one of nibbles
    uint32_t run[kWords] = {};
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        run[e * kWords / 4] |= (words[h][e] >> kShift & mask)
                               << layout::position(kWidth, 16 * h + e, 0).shift;
    if constexpr (kWords == 4) store_128(p, {{run[0], run[1], run[2], run[3]}});
    else if constexpr (kWords == 2) *reinterpret_cast<Words2*>(p) = {{run[0], run[1]}};
    else *reinterpret_cast<uint32_t*>(p) = run[0];
  }
}

// `wide`: rows of codes start on multiples of 4 bytes, and have whole words.
inline __global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const PackArgs args, const bool wide) {
  const PackPlace place = pack_place<32>(args.kp);
  const int t = int(place.col % layout::kUnitCols) / 4;
  uint8_t* unit = args.packed + layout::unit_offset(place.first, place.col, args.kp, args.bits);
  const bool inside = place.first < layout::padded_n(args.n) && place.col < args.kp;
  uint32_t seen = 0;
#pragma unroll 1
  for (int q = 0; q < 2; q++) {
    uint32_t words[2][4];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t row = place.first + 32 * q + 16 * h + 4 * place.c + e;
        const uint8_t* p = args.codes + row * args.k + place.col;
        uint32_t word = 0;
        if (row < args.n && wide) {
          if (place.col < args.k) word = *reinterpret_cast<const uint32_t*>(p);
        } else if (row < args.n) {
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (place.col + j < args.k) word |= uint32_t(p[j]) << (8 * j);
        }
        words[h][e] = word;
        seen |= word;
      }
    if (!inside) continue;
    with_bits(args.bits, [&](auto bits) {
      constexpr layout::Planes planes = layout::planes(decltype(bits)::value);
      constexpr layout::Plane first = planes.plane[0], second = planes.plane[1];
      store_plane<first.width, first.shift>(unit, q, t, place.c, words);
      if constexpr (planes.count > 1)
        store_plane<second.width, second.shift>(unit + second.offset, q, t, place.c, words);
    });
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) seen |= shuffle_xor(seen, mask);
  if (threadIdx.x % 32 == 0 && seen != 0) global_or(args.seen, seen);
}

// Blocks for all of n rows x `columns`, in warps of 64 rows x kCols.
template <int kCols>
dim3 pack_grid(int64_t n, int64_t columns) {
  constexpr int kWarps = kPackThreads / 32;
  const int64_t warps = layout::padded_n(n) / layout::kUnitRows * ((columns + kCols - 1) / kCols);
  return dim3(unsigned((warps + kWarps - 1) / kWarps));
}

template <class T>
cudaError_t launch_dequantize_typed(const UnpackArgs& args, cudaStream_t stream) {
  const bool wide = args.w.k % 8 == 0 && on_16_bytes(args.out);
  return launch(dequantize_kernel<T>, pack_grid<64>(args.w.n, args.w.k), dim3(kPackThreads), 0,
                stream, args, wide);
}
inline cudaError_t launch_unpack(const UnpackArgs& args, cudaStream_t stream) {
  const bool wide = args.w.k % 8 == 0 && on_16_bytes(args.out);
  return launch(unpack_kernel, pack_grid<64>(args.w.n, args.w.k), dim3(kPackThreads), 0, stream,
                args, wide);
}
inline cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  const bool wide = args.k % 4 == 0 && reinterpret_cast<uintptr_t>(args.codes) % 4 == 0;
  return launch(pack_kernel, pack_grid<32>(args.n, args.kp), dim3(kPackThreads), 0, stream, args,
                wide);
}

}  // namespace qk
