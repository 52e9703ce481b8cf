// y = x W^T of int8 activations on int8 tensor cores: what the kernels for few tokens
// (linear_int8_decode.cuh) and for many (linear_int8_tile.cuh) share. Torch-free.
//
// A warp takes 64 rows of W, the rows of a unit, times tiles of 8 tokens. With g = lane / 4 and
// t = lane % 4 a lane decodes columns 4 t .. 4 t + 3 of eight rows of a unit,
//   row(e, h) = 32 (g / 4) + 16 h + 4 (g % 4) + e,
// which are rows g (h = 0) and g + 8 (h = 1) of the A fragment of row tile e. Two units, 32
// columns, make one m16n8k32; a unit that is alone in its span gets zeros beside it.
//
// Decoding puts a code of b bits at the top of its byte, so that products are those of
// code 2^(8 - b), and symmetric codes are made signed by turning the top bit:
// (code - 2^(b - 1)) 2^(8 - b). Exact, at no cost, and symmetric weights need no sums of
// activations. With zero points and minima codes stay unsigned, and one more product, of ones,
// gives the sums.
//
// Columns are taken in spans of min(G, Ga), in which weight and activation have one scale each;
// the sums of a span are integers.
#pragma once
#include "launchers.h"
#include "linear_int8_codes.cuh"
#include "scale.cuh"
#include "words.cuh"

namespace qk {

constexpr int kInt8Threads = 256, kInt8Warps = kInt8Threads / 32;

// What the launch tells the kernels beside LinearArgs. A stage of shared memory holds, per block of
// 64 rows, the codes of up to `chunk` units and the scales of their groups, then the activations:
//   codes [chunk, unit_bytes], scale and zero [groups of a chunk, 64], block_scale, block_zero
//   [64]; x: [tokens, chunk + 1, 16] bytes, whose odd number of 16 bytes per token lets eight
//   tokens' pieces of a unit lie in different banks
struct Int8Plan {
  int units;  // of columns up to K: there is no more in x, and beyond it nothing but zeros
  int part_chunks, long_parts;  // columns go to parts of this many chunks; the first have one more
  int group_units, act_units;   // units that share a scale
  int groups, act_groups;       // scales of a row of W, of x
  bool act_per_token;           // one scale per row of x: applied at the end
  bool aligned_fours;           // four rows of y, and of residual, can be accessed at once
  int scale_bytes, zero_bytes;  // of a row in a group
  int scale_at, zero_at, block_at;  // in the part of a row block
  int block_bytes;                  // that part
  int x_at, stage_bytes;
  int row_blocks;              // of a thread block
  int row_tiles, token_tiles;  // thread blocks
  int splits;                  // thread blocks that share the columns of a tile
  float* partial;              // [splits, tiles, ...] if there are several
  uint32_t* counters;          // [tiles]

  // The chunks of a part: the first, and how many.
  __device__ __forceinline__ int first_chunk(int part) const {
    return part * part_chunks + (part < long_parts ? part : long_parts);
  }
  __device__ __forceinline__ int count_chunks(int part) const {
    return part_chunks + (part < long_parts ? 1 : 0);
  }
};

// The pieces of shared memory, all multiples of 16 bytes, that hold units u0 .. u0 + n of a block
// of 64 rows: copy(place in the block's part of the stage, source, bytes, are these codes).
template <class C, bool kScales, class Copy>
__device__ __forceinline__ void weight_pieces(const Weight& w, const Int8Plan& p, int block, int u0,
                                              int n, const Copy& copy) {
  copy(0, w.codes + (block * (w.kp / 16) + u0) * C::unit_bytes, n * C::unit_bytes, true);
  if (!kScales) return;
  const int first = u0 / p.group_units, groups = (u0 + n - 1) / p.group_units - first + 1;
  const int64_t at = (int64_t(block) * p.groups + first) * 64;
  const auto* scale = static_cast<const uint8_t*>(w.scale);
  copy(p.scale_at, scale + at * p.scale_bytes, groups * 64 * p.scale_bytes, false);
  if constexpr (C::offset) {
    const auto* zero = static_cast<const uint8_t*>(w.zero);
    if (p.zero_bytes) copy(p.zero_at, zero + at * p.zero_bytes, groups * 64 * p.zero_bytes, false);
  }
  if (w.block_scale) {
    const int64_t of_block = (block * (w.kp / layout::kBlockGroup) + u0 / 16) * 64;
    copy(p.block_at, reinterpret_cast<const uint8_t*>(w.block_scale + of_block), 128, false);
    if constexpr (C::offset)
      copy(p.block_at + 128, reinterpret_cast<const uint8_t*>(w.block_zero + of_block), 128, false);
  }
}

// ---- products ----

template <class C>
__device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (C::offset) mma_16832_u8s8(d, a, b0, b1);
  else mma_16832_s8s8(d, a, b0, b1);
}

// What a lane has of 64 rows times kTiles tiles of 8 tokens; element [n][e][2 h + j] belongs to
// row(e, h) and token 8 n + 2 t + j.
template <class C, int kTiles>
struct Int8Sums {
  int32_t dot[kTiles][4][4];  // of this span
  // Of the activations in it, for offset codes, which have at most two tiles: elements 0 (and 1)
  // belong to token lane / 4 of the first tile, 2 (and 3) of the second.
  int32_t sum[4];
  static_assert(!C::offset || kTiles <= 2);
  float y[kTiles][4][4];  // of the spans before it

  __device__ __forceinline__ void start_span() {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum[i] = 0;
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dot[n][e][i] = 0;
    }
  }
  __device__ __forceinline__ void start() {
    start_span();
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
#pragma unroll
        for (int i = 0; i < 4; i++) y[n][e][i] = 0;
  }

  template <int kE>
  __device__ __forceinline__ void add_row_tile(const RawUnit<C> (&raw)[2], const Int8Table& table,
                                               const uint32_t (&b)[kTiles][2]) {
    uint32_t a[4];
    decode<C, kE>(raw[0], table, a[0], a[1]);
    decode<C, kE>(raw[1], table, a[2], a[3]);
#pragma unroll
    for (int n = 0; n < kTiles; n++) mma<C>(dot[n][kE], a, b[n][0], b[n][1]);
  }

  // One unit or two. x: this lane's row of the matrices that load_matrices reads, see x_row.
  template <bool kSwizzled>
  __device__ __forceinline__ void add_units(const uint8_t* unit, const uint8_t* x, int x_pitch,
                                            bool two, const Int8Table& table, int lane) {
    uint32_t b[kTiles][2];
    const uint8_t* from = x + (two && lane / 8 % 2 ? 16 : 0);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t r[4];
      load_matrices(r, from + 8 * n * x_pitch);
      b[n][0] = r[0], b[n][1] = two ? r[1] : 0;
      if constexpr (kTiles > 1) b[n + 1][0] = r[2], b[n + 1][1] = two ? r[3] : 0;
    }
    if constexpr (C::offset) {
      // Activations as A: its rows are 16 tokens. Any column of the product has the sums.
      constexpr int other = kTiles - 1;  // a tile alone fills both halves
      const uint32_t a[4] = {b[0][0], b[other][0], b[0][1], b[other][1]};
      mma_16832_s8s8(sum, a, 0x01010101u, 0x01010101u);
    }
    const uint8_t* next = two ? unit + C::unit_bytes : unit;
    RawUnit<C> raw[2];
    raw[0].template load<kSwizzled, 0>(unit, lane);
    raw[1].template load<kSwizzled, 0>(next, lane);
    add_row_tile<0>(raw, table, b);
    add_row_tile<1>(raw, table, b);
    if constexpr (C::in_halves) {
      raw[0].template load<kSwizzled, 1>(unit, lane);
      raw[1].template load<kSwizzled, 1>(next, lane);
    }
    add_row_tile<2>(raw, table, b);
    add_row_tile<3>(raw, table, b);
  }
};

// The token, of 16 (or 8), whose row a lane gives to load_matrices: matrix i = lane / 8 is of unit
// i % 2 and of tile i / 2.
template <int kTiles>
__device__ __forceinline__ int x_row(int lane) {
  return lane % 8 + (kTiles > 1 ? lane / 16 * 8 : 0);
}

// ---- scales ----

// Four stored scales of neighbouring rows as floats; integers count as signed bytes.
__device__ __forceinline__ void four_scales(Scale kind, const uint8_t* from, float (&out)[4]) {
  if (kind == Scale::f32) {
    const Words4 v = *reinterpret_cast<const Words4*>(from);
#pragma unroll
    for (int e = 0; e < 4; e++) out[e] = bits_float(int32_t(v.word[e]));
  } else if (kind == Scale::f16 || kind == Scale::bf16) {
    const Words2 v = *reinterpret_cast<const Words2*>(from);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const uint16_t bits = uint16_t(v.word[e / 2] >> 16 * (e % 2));
      out[e] = kind == Scale::f16 ? widen(from_bits<half_t>(bits)) : widen(from_bits<bf16_t>(bits));
    }
  } else {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const uint8_t b = uint8_t(v >> 8 * e);
      out[e] = kind == Scale::e8m0   ? e8m0_to_float(b)
               : kind == Scale::e4m3 ? e4m3_to_float(b)
                                     : float(int8_t(b));
    }
  }
}
__device__ __forceinline__ void four_bytes(const uint8_t* from, int shift, int mask,
                                           float (&out)[4]) {
  const uint32_t v = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
  for (int e = 0; e < 4; e++) out[e] = float(int(v >> (8 * e + shift)) & mask);
}

// scale[e] and zero[e] of a lane's rows of this h, so that y = scale dot - zero sum. `block` is the
// row block's part of a stage, `group` counts in it.
template <class C>
__device__ __forceinline__ void row_scales(const Weight& w, const Int8Plan& p, const uint8_t* block,
                                           int group, int h, int lane, float (&scale)[4],
                                           float (&zero)[4]) {
  const bool nibbles = w.scale_kind == Scale::two_nibble;
  const int row = lane / 16 * 32 + 16 * h + lane / 4 % 4 * 4, i = group * 64 + row;
  const auto times_block = [&](int at, float (&v)[4]) {
    if (!w.block_scale) return;
    float of_block[4];
    four_scales(Scale::f16, block + p.block_at + at + 2 * row, of_block);
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] *= of_block[e];
  };
  const uint8_t* stored = block + p.scale_at + i * p.scale_bytes;
  if (nibbles) four_bytes(stored, 0, 15, scale);
  else four_scales(w.scale_kind, stored, scale);
  times_block(0, scale);
  if constexpr (C::offset) {
    const uint8_t* stored_zero = block + p.zero_at + i * p.zero_bytes;
    if (w.zero_kind == Zero::integer) {
      four_bytes(stored_zero, 0, 255, zero);
#pragma unroll
      for (int e = 0; e < 4; e++) zero[e] *= scale[e];
    } else {
      if (nibbles) four_bytes(stored, 4, 15, zero);
      else four_scales(w.scale_kind, stored_zero, zero);
      times_block(128, zero);
    }
  }
}

// ---- columns ----

// Where a warp is on its way along the columns.
struct Cursor {
  int group, act_group;
  int group_left, act_left;  // units until the next one

  __device__ __forceinline__ Cursor(const Int8Plan& p, int unit)
      : group(unit / p.group_units),
        act_group(unit / p.act_units),
        group_left((group + 1) * p.group_units - unit),
        act_left((act_group + 1) * p.act_units - unit) {}
};

// Adds the sums of a span to y. first_token: of the warp; those from M on repeat the last one.
template <class C, int kTiles>
__device__ __forceinline__ void end_span(const LinearArgs& args, const Int8Plan& p,
                                         const uint8_t* block, int group, int act_group,
                                         int first_token, int lane, Int8Sums<C, kTiles>& sums) {
  float x_scale[kTiles][2], sum[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      x_scale[n][j] = 1;
      if (!p.act_per_token) {
        int token = first_token + 8 * n + 2 * (lane % 4) + j;
        if (token >= args.m) token = int(args.m) - 1;
        x_scale[n][j] = args.act.scale[int64_t(token) * p.act_groups + act_group];
      }
      if constexpr (C::offset) {
        const int first_lane = 8 * (lane % 4);  // of the four with the sums of token 2 (lane % 4)
        const int32_t of_token = shuffle(sums.sum[2 * n], first_lane + 4 * j);
        sum[n][j] = float(of_token << C::shift) * x_scale[n][j];
      }
    }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float scale[4], zero[4];
    row_scales<C>(args.w, p, block, group, h, lane, scale, zero);
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float& y = sums.y[n][e][2 * h + j];
          y = fma(scale[e], float(sums.dot[n][e][2 * h + j]) * x_scale[n][j], y);
          if constexpr (C::offset) y = fma(-zero[e], sum[n][j], y);
        }
  }
}

// Units u0 .. u0 + n, which lie in a stage: `block` is the part of the warp's row block, x this
// lane's row of it. last: no more units follow.
template <class C, int kTiles, bool kSwizzled>
__device__ __forceinline__ void add_chunk(const LinearArgs& args, const Int8Plan& p,
                                          const uint8_t* block, const uint8_t* x, int x_pitch,
                                          int n, bool last, int first_token, int lane,
                                          const Int8Table& table, Cursor& at,
                                          Int8Sums<C, kTiles>& sums) {
  const int first_group = at.group;
#pragma unroll 1
  for (int u = 0; u < n;) {
    int end = u + (at.group_left < at.act_left ? at.group_left : at.act_left);
    const bool whole = end <= n;
    if (!whole) end = n;
    at.group_left -= end - u, at.act_left -= end - u;
#pragma unroll 1
    for (; u < end; u += 2)
      sums.template add_units<kSwizzled>(block + u * C::unit_bytes, x + 16 * u, x_pitch,
                                         u + 1 < end, table, lane);
    u = end;
    if (whole || last) {
      end_span<C, kTiles>(args, p, block, at.group - first_group, at.act_group, first_token, lane,
                          sums);
      sums.start_span();
    }
    if (at.group_left == 0) at.group++, at.group_left = p.group_units;
    if (at.act_left == 0) at.act_group++, at.act_left = p.act_units;
  }
}

// What the sums of a token, below M, are multiplied by in the end.
template <class C>
__device__ __forceinline__ float last_factor(const LinearArgs& args, const Int8Plan& p, int token) {
  constexpr float unshift = 1.f / (1 << C::shift);
  if (!p.act_per_token) return unshift;
  return unshift * args.act.scale[token];
}

template <class C>
__device__ __forceinline__ Int8Table load_int8_table(const Weight& w) {
  Int8Table out{};
  if constexpr (C::table) {
#pragma unroll
    for (int i = 0; i < 16; i++) out.word[i / 4] |= uint32_t(uint8_t(w.table[i])) << 8 * (i % 4);
  }
  return out;
}

// ---- results ----

// Four elements of T at p, which are aligned together.
template <class T>
__device__ __forceinline__ void load_four(const T* p, float (&out)[4]) {
  if constexpr (sizeof(T) == 4) {
    unpack<T>(*reinterpret_cast<const Words4*>(p), out);
  } else {
    const Words2 words = *reinterpret_cast<const Words2*>(p);
#pragma unroll
    for (int e = 0; e < 4; e++)
      out[e] = widen(from_bits<T>(uint16_t(words.word[e / 2] >> 16 * (e % 2))));
  }
}
template <class T>
__device__ __forceinline__ void store_four(T* p, const float (&v)[4]) {
  if constexpr (sizeof(T) == 4) *reinterpret_cast<Words4*>(p) = pack<T>(v);
  else
    *reinterpret_cast<Words2*>(p) =
        Words2{{narrow_pair<T>(v[0], v[1]), narrow_pair<T>(v[2], v[3])}};
}
// y of token m and rows n .. n + 3, n a multiple of 4; v are the sums.
template <class T>
__device__ __forceinline__ void write_four(const LinearArgs& args, const Int8Plan& p, int64_t m,
                                           int64_t n, float (&v)[4]) {
  T* y = static_cast<T*>(args.y) + m * args.y_stride + n;
  const T* residual =
      args.residual ? static_cast<const T*>(args.residual) + m * args.residual_stride + n : nullptr;
  const auto* bias = args.bias ? static_cast<const float*>(args.bias) + n : nullptr;
  if (p.aligned_fours) {  // N is a multiple of 4
    if (n >= args.w.n) return;
    float more[4];
    if (bias) {
      load_four(bias, more);
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] += more[e];
    }
    if (residual) {
      load_four(residual, more);
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] += more[e];
    }
    return store_four(y, v);
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    if (n + e >= args.w.n) return;
    float sum = v[e];
    if (bias) sum += bias[e];
    if (residual) sum += widen(residual[e]);
    y[e] = narrow<T>(sum);
  }
}
__device__ __forceinline__ void write_four(const LinearArgs& args, const Int8Plan& p, int64_t m,
                                           int64_t n, float (&v)[4]) {
  switch (args.y_type) {
    case Dtype::f32: return write_four<float>(args, p, m, n, v);
    case Dtype::f16: return write_four<half_t>(args, p, m, n, v);
    case Dtype::bf16: return write_four<bf16_t>(args, p, m, n, v);
  }
}

// Of the blocks that share a tile, the last to come here learns that it is: what they have written
// to `partial` before is then there for it to read. By all threads; flag: in shared memory.
__device__ __forceinline__ bool last_to_arrive(const Int8Plan& p, int tile, uint32_t* flag) {
  device_fence();
  block_sync();
  if (threadIdx.x == 0)
    *flag = count_around(p.counters + tile, uint32_t(p.splits - 1)) == uint32_t(p.splits - 1);
  block_sync();
  if (*flag == 0) return false;
  device_fence();  // behind the count, as the memory model has it
  return true;
}
// partial: four floats each, [splits, tiles, size of a tile]; the sum over the splits in order.
__device__ __forceinline__ Words4* partial_at(const Int8Plan& p, int split, int tile, int size,
                                              int i) {
  const int64_t tiles = int64_t(p.row_tiles) * p.token_tiles;
  return reinterpret_cast<Words4*>(p.partial) + (split * tiles + tile) * size + i;
}
__device__ __forceinline__ void store_partial(const Int8Plan& p, int split, int tile, int size,
                                              int i, const float (&v)[4]) {
  Words4 out;
#pragma unroll
  for (int e = 0; e < 4; e++) out.word[e] = uint32_t(float_bits(v[e]));
  *partial_at(p, split, tile, size, i) = out;
}
__device__ __forceinline__ void sum_partials(const Int8Plan& p, int tile, int size, int i,
                                             float (&v)[4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) v[e] = 0;
  for (int s = 0; s < p.splits; s++) {
    const auto* from = reinterpret_cast<const float*>(partial_at(p, s, tile, size, i));
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] += load_other_block(from + e);
  }
}

// ---- launches ----

enum class Int8Kernel {
  decode_8,  // up to 8 tokens
  decode_16,
  tile,
  tile_rows,  // one scale per row and per token
};
struct Int8Launch {
  Int8Kernel kernel;
  Int8Plan plan;
  dim3 grid;
  int threads;
  int64_t shared_bytes;
};

// Of one kind of codes; each is instantiated in a file of its own.
template <int kBits>
cudaError_t launch_int8_bits(const Int8Launch& l, const LinearArgs& args, cudaStream_t stream);
cudaError_t launch_int8_table(const Int8Launch& l, const LinearArgs& args, cudaStream_t stream);

}  // namespace qk
