// What the kernels of float16 and bfloat16 activations share: a warp multiplies units of a weight,
// which lie in shared memory, by activations, and scales the sums of every group in float32.
//
// Codes become 16-bit floats without a conversion: or-ed into the mantissa of a power of two whose
// unit in the last place is 1, a code q is that number plus q. What is added is taken away from the
// sums: in every group, the float32 sum of x is another matrix product, by ones.
//
//                 4-bit codes                  8 bits, values of tables     2, 3, 5, 6 bits
//   float16       0x6400 = 1024: 1024 + q;     1024 + q                     1024 + q
//                 high nibbles stay where they
//                 are: 1024 + 16 q
//   bfloat16      0x4300 = 128: 128 + q        two products, of 128 + low   128 + q
//                                              nibble and (0x4500 = 2048)
//                                              2048 + 16 * high nibble
//
// 16 bits of a fragment's register pair columns 4 t and 4 t + 2, or 4 t + 1 and 4 t + 3, because a
// 32-bit word of codes is masked, or its bytes are interleaved with the power's upper byte. So the
// activations of a lane are x[4 t], x[4 t + 2] and x[4 t + 1], x[4 t + 3].
#pragma once
#include "scale.cuh"
#include "weight.cuh"

namespace qk {

template <class T>
constexpr bool is_bf16 = __is_same(T, bf16_t);

// How codes C stand in fragments of T.
template <class T, class C>
struct Magic {
  static constexpr bool bytes = C::bits == 8 || C::table;  // codes of 0 .. 255
  static constexpr bool nibbles = C::bits == 4 && !C::table;
  static constexpr int products = is_bf16<T> && bytes ? 2 : 1;  // fragments per 16 x 16 codes
  static constexpr float added = is_bf16<T> ? (bytes ? 128 + 2048 : 128) : 1024;
  // In the rows of h = 1 codes count this much more.
  static constexpr float upper_factor = nibbles && !is_bf16<T> ? 16 : 1;
};

// The fragments of row tile kE; a[p][i]: half i % 2, register pair i / 2 of the columns.
template <class T, class C, int kE>
__device__ __forceinline__ void fragments(const LaneUnit<C>& u, const TableWords& table,
                                          uint32_t (&a)[Magic<T, C>::products][4]) {
  using M = Magic<T, C>;
  if constexpr (M::nibbles) {
    const uint32_t w = u.wide[kE];
    if constexpr (is_bf16<T>) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[0][i] = and_or(w >> 4 * i, 0x000f000fu, 0x43004300u);
    } else {
      const uint32_t odd = w >> 8;
      a[0][0] = and_or(w, 0x000f000fu, 0x64006400u);
      a[0][1] = and_or(w, 0x00f000f0u, 0x64006400u);
      a[0][2] = and_or(odd, 0x000f000fu, 0x64006400u);
      a[0][3] = and_or(odd, 0x00f000f0u, 0x64006400u);
    }
  } else {
    uint32_t codes[2];
    if constexpr (C::table) {
      look_up(table, u.wide[kE], codes);
    } else {
      codes[0] = code_bytes<kE, 0>(u);
      codes[1] = code_bytes<kE, 1>(u);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if constexpr (M::products == 2) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          a[0][h + 2 * j] = and_or(codes[h] >> 8 * j, 0x000f000fu, 0x43004300u);
          a[1][h + 2 * j] = and_or(codes[h] >> (8 * j + 4), 0x000f000fu, 0x45004500u);
        }
      } else {
        constexpr uint32_t power = is_bf16<T> ? 0x43434343u : 0x64646464u;
        a[0][h] = select_bytes(codes[h], power, 0x4240);
        a[0][h + 2] = select_bytes(codes[h], power, 0x4341);
      }
    }
  }
}

// Four activations of a lane, x[4 t .. 4 t + 3], as B's registers.
__device__ __forceinline__ Words2 pair_columns(const Words2& x) {
  return {{select_bytes(x.word[0], x.word[1], 0x5410), select_bytes(x.word[0], x.word[1], 0x7632)}};
}

// ---- stages ----

// A stage of shared memory holds kUnits units of one 64-row block, that start at a multiple of
// them, and all that their scales need; each piece is contiguous in global memory and here, and a
// multiple of 64 bytes.
struct StageLayout {
  int scale, zero, block_scale, block_zero;  // byte offsets; codes are at 0
  int bytes;                                 // a multiple of 128
};
// Groups that `units` units at a multiple of `units` may touch.
constexpr int groups_touched(int units, int group_units) {
  if (units % group_units == 0) return units / group_units;
  if (group_units % units == 0) return 1;
  return (units + group_units - 2) / group_units + 1;
}
inline int zero_size(const Weight& w) {
  return w.zero == nullptr ? 0 : w.zero_kind == Zero::integer ? 1 : scale_size(w.scale_kind);
}
inline StageLayout stage_layout(const Weight& w, int units) {
  const int groups = groups_touched(units, w.group / layout::kUnitCols);
  StageLayout s{};
  s.scale = units * int(layout::unit_bytes(w.bits));
  s.zero = s.scale + groups * 64 * scale_size(w.scale_kind);
  s.block_scale = s.zero + groups * 64 * zero_size(w);
  s.block_zero = s.block_scale + (w.block_scale ? 128 : 0);
  s.bytes = int(layout::round_up(s.block_zero + (w.block_zero ? 128 : 0), 128));
  return s;
}

// Calls piece(offset in the stage, from, bytes) for what units [first, first + units) of row block
// `block` need, of which all lie in one block of 256 columns where scales have two levels.
template <class C, class F>
__device__ __forceinline__ void for_pieces(const Weight& w, const StageLayout& s, int zero_bytes,
                                           int64_t block, int first, int units, const F& piece) {
  const int all = int(w.kp / layout::kUnitCols), group_units = w.group / layout::kUnitCols;
  piece(0, w.codes + (block * all + first) * C::unit_bytes, units * C::unit_bytes);
  const int group = first / group_units, last = (first + units - 1) / group_units;
  const int64_t at = (block * (all / group_units) + group) * 64;
  const int rows = (last - group + 1) * 64, size = scale_size(w.scale_kind);
  piece(s.scale, static_cast<const uint8_t*>(w.scale) + at * size, rows * size);
  if (w.zero)
    piece(s.zero, static_cast<const uint8_t*>(w.zero) + at * zero_bytes, rows * zero_bytes);
  if (w.block_scale) {
    const int64_t i = (block * (all / 16) + first / 16) * 64;
    piece(s.block_scale, w.block_scale + i, 128);
    if (w.block_zero) piece(s.block_zero, w.block_zero + i, 128);
  }
}

// ---- scales ----

// Four stored flat scales or minima, of rows `row` .. `row` + 3.
__device__ __forceinline__ void four_flat(Scale kind, const uint8_t* scales, int row,
                                          float (&out)[4]) {
  if (kind == Scale::f16 || kind == Scale::bf16) {
    const Words2 v = *reinterpret_cast<const Words2*>(scales + 2 * row);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const auto bits = uint16_t(v.word[e / 2] >> 16 * (e % 2));
      out[e] = kind == Scale::f16 ? widen(from_bits<half_t>(bits)) : widen(from_bits<bf16_t>(bits));
    }
  } else if (kind == Scale::f32) {
    const Words4 v = *reinterpret_cast<const Words4*>(scales + 4 * row);
#pragma unroll
    for (int e = 0; e < 4; e++) out[e] = bits_float(int32_t(v.word[e]));
  } else {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(scales + row);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const auto byte = uint8_t(v >> 8 * e);
      out[e] = kind == Scale::e8m0 ? e8m0_to_float(byte) : e4m3_to_float(byte);
    }
  }
}
__device__ __forceinline__ void four_halves(const uint8_t* p, int row, float (&out)[4]) {
  four_flat(Scale::f16, p, row, out);
}

// What rows `row` .. `row` + 3 (row a multiple of 4) of a group need: w = scale * (code - zero) -
// minimum.
struct FourScales {
  float scale[4], zero[4], minimum[4];
};
template <class C>
__device__ __forceinline__ FourScales four_scales(const Weight& w, const StageLayout& s,
                                                  const uint8_t* stage, int group /* in it */,
                                                  int row) {
  const int at = group * 64 + row;
  FourScales out;
#pragma unroll
  for (int e = 0; e < 4; e++) {
    out.minimum[e] = 0;
    // Values of a table are bytes value + 128.
    out.zero[e] = w.zero_kind == Zero::minimum ? 0.f : C::table ? 128.f : float(1 << (C::bits - 1));
  }
  if (w.zero_kind == Zero::integer) {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(stage + s.zero + at);
#pragma unroll
    for (int e = 0; e < 4; e++) out.zero[e] = float(v >> 8 * e & 255);
  }
  if (w.block_scale == nullptr) {
    four_flat(w.scale_kind, stage + s.scale, at, out.scale);
    if (w.zero_kind == Zero::minimum) four_flat(w.scale_kind, stage + s.zero, at, out.minimum);
    return out;
  }
  const bool nibbles = w.scale_kind == Scale::two_nibble;
  float block[4];
  four_halves(stage + s.block_scale, row, block);
  const uint32_t stored = *reinterpret_cast<const uint32_t*>(stage + s.scale + at);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const auto byte = uint8_t(stored >> 8 * e);
    out.scale[e] = block[e] * float(nibbles ? byte & 15 : int(int8_t(byte)));
  }
  if (w.zero_kind == Zero::minimum) {
    four_halves(stage + s.block_zero, row, block);
    const uint32_t minima =
        nibbles ? stored >> 4 : *reinterpret_cast<const uint32_t*>(stage + s.zero + at);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const auto byte = uint8_t(minima >> 8 * e);
      out.minimum[e] = block[e] * float(nibbles ? byte & 15 : int(int8_t(byte)));
    }
  }
  return out;
}

// ---- sums ----

// A warp's sums of 64 rows by 8 kTiles tokens. total[i][e][2 h + j] is of row 32 q + 16 h + 4 c + e
// and token 8 i + 2 t + j; group is of the codes of one group, as they stand in fragments, and
// x[i][j] the sum of that group's activations (and x[i][j + 2], of other rows, the same).
template <class T, class C, int kTiles>
struct UnitSums {
  float total[kTiles][4][4] = {};
  float group[kTiles][4][4] = {};
  float x[kTiles][4] = {};

  // One unit; b[i]: the activations of token tile i.
  __device__ __forceinline__ void add(const LaneUnit<C>& unit, const TableWords& table,
                                      const Words2 (&b)[kTiles]) {
    constexpr uint32_t one = is_bf16<T> ? 0x3f803f80u : 0x3c003c00u;
    const uint32_t ones[4] = {one, one, one, one};
#pragma unroll
    for (int i = 0; i < kTiles; i++) mma_16816<T>(x[i], ones, b[i].word[0], b[i].word[1]);
    row_tile<0>(unit, table, b);
    row_tile<1>(unit, table, b);
    row_tile<2>(unit, table, b);
    row_tile<3>(unit, table, b);
  }
  template <int kE>
  __device__ __forceinline__ void row_tile(const LaneUnit<C>& unit, const TableWords& table,
                                           const Words2 (&b)[kTiles]) {
    constexpr int products = Magic<T, C>::products;
    uint32_t a[products][4];
    fragments<T, C, kE>(unit, table, a);
#pragma unroll
    for (int p = 0; p < products; p++)
#pragma unroll
      for (int i = 0; i < kTiles; i++) mma_16816<T>(group[i][kE], a[p], b[i].word[0], b[i].word[1]);
  }

  // The group, or a part of it, is over. What was added to codes goes before the scale comes, so
  // that single products are as exact as the reference's.
  __device__ __forceinline__ void scale_group(const Weight& w, const StageLayout& s,
                                              const uint8_t* stage, int at, int lane) {
    using M = Magic<T, C>;
    const int row = lane / 16 * 32 + lane / 4 % 4 * 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const FourScales f = four_scales<C>(w, s, stage, at, row + 16 * h);
      const float factor = h ? M::upper_factor : 1;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float offset = -(M::added + factor * f.zero[e]), scale = f.scale[e] * (1 / factor);
#pragma unroll
        for (int i = 0; i < kTiles; i++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float& sum = total[i][e][2 * h + j];
            sum = fma(fma(x[i][j], offset, group[i][e][2 * h + j]), scale, sum);
            if (w.zero_kind == Zero::minimum) sum = fma(x[i][j], -f.minimum[e], sum);
            group[i][e][2 * h + j] = 0;
          }
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) x[i][j] = 0;
  }

  // Units [from, to) of a stage that starts at unit `first`; b(unit, i) gives activations. If the
  // warp goes on at unit `next` (0: it does not), and that is of the same group as the last one,
  // the group is left open.
  template <class F>
  __device__ __forceinline__ void add_units(const Weight& w, const StageLayout& s,
                                            const uint8_t* stage, int first, int from, int to,
                                            int next, int lane, const TableWords& table,
                                            const F& b) {
    if (from >= to) return;
    const int group_units = w.group / layout::kUnitCols;
    const int first_group = first / group_units;
    int group = from / group_units;
    int group_end = (group + 1) * group_units;
#pragma unroll 1
    for (int unit = from; unit < to; unit++) {
      Words2 activations[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; i++) activations[i] = b(unit, i);
      add(load_unit<C>(stage + (unit - first) * C::unit_bytes, lane), table, activations);
      const bool group_ends = unit + 1 == group_end;
      const bool goes_on = next > 0 && next < group_end;
      if (group_ends || (unit + 1 == to && !goes_on))
        scale_group(w, s, stage, group - first_group, lane);
      if (group_ends) group++, group_end += group_units;
    }
  }
};

// ---- activations ----

// x [M, K] of 16-bit floats, 8 columns from `column` on (a multiple of 8) of `token`; zero beyond
// K.
template <class T>
__device__ __forceinline__ Words4 eight_activations(const LinearArgs& args, bool vectors,
                                                    int64_t token, int64_t column) {
  const T* x = static_cast<const T*>(args.x) + token * args.x_stride;
  if (vectors && column + 8 <= args.w.k) return load_read_only(x + column);
  Words4 v{};
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (column + i < args.w.k) v.word[i / 2] |= uint32_t(to_bits(x[column + i])) << 16 * (i % 2);
  return v;
}

// ---- results ----

// What is added to row n of the weight and token m, and the store.
template <class T>
__device__ __forceinline__ void store_result(const LinearArgs& args, int64_t m, int64_t n,
                                             float sum) {
  if (args.bias) sum += static_cast<const float*>(args.bias)[n];
  if (args.residual)
    sum += widen(static_cast<const T*>(args.residual)[m * args.residual_stride + n]);
  static_cast<T*>(args.y)[m * args.y_stride + n] = narrow<T>(sum);
}

// A tile of float32 sums [tokens, rows] in shared memory, `parts` of them one after the other, goes
// to y: the parts' sum, in order, plus those of the other blocks that split K with this one. These
// leave theirs in partial [splits, tiles, tokens, rows]; the last to arrive adds them, in order.
struct TileSplit {
  float* partial;
  uint32_t* counters;  // [tiles], zero before and after
  int splits;
};
template <class T>
__device__ __forceinline__ void store_tile(const LinearArgs& args, const TileSplit& split,
                                           const float* sums, int parts, int tokens, int rows,
                                           int64_t token, int64_t row, int64_t tile, int64_t tiles,
                                           int part_of_k, int32_t* last) {
  const int64_t present_tokens = args.m - token;
  const int used = int(present_tokens < tokens ? present_tokens : tokens) * rows;
  const auto write = [&](int i, float sum) {
    if (row + i % rows < args.w.n) store_result<T>(args, token + i / rows, row + i % rows, sum);
  };
  const int size = tokens * rows;
  for (int i = int(threadIdx.x); i < used; i += int(blockDim.x)) {
    float sum = 0;
    for (int p = 0; p < parts; p++) sum += sums[p * size + i];
    if (split.splits == 1) write(i, sum);
    else split.partial[(part_of_k * tiles + tile) * size + i] = sum;
  }
  if (split.splits == 1) return;
  device_fence();
  block_sync();
  if (threadIdx.x == 0)
    *last = count_around(split.counters + tile, uint32_t(split.splits - 1)) ==
            uint32_t(split.splits - 1);
  block_sync();
  if (!*last) return;
  device_fence();
  for (int i = int(threadIdx.x); i < used; i += int(blockDim.x)) {
    float sum = 0;
    for (int p = 0; p < split.splits; p++)
      sum += load_other_block(split.partial + (p * tiles + tile) * size + i);
    write(i, sum);
  }
}

}  // namespace qk
