// What the kernels of float16 and bfloat16 activations share: a warp multiplies units of a weight,
// which lie in shared memory, by activations, and scales the sums of every group in float32.
//
// Codes become 16-bit floats without a conversion: or-ed into the mantissa of a power of two whose
// unit in the last place is 1, a code q is that number plus q. What is added is taken away from the
// sums, by another matrix product in which it is constant.
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

// Groups of columns along the stages of a warp: the group in which one starts, and how many units
// of that group lie before it. Steps have one length, so that nothing is divided on the way.
struct GroupCursor {
  int group, before;
  int groups_per_step, units_per_step, group_units;

  __device__ __forceinline__ GroupCursor(int unit, int step, int group_units)
      : group(unit / group_units),
        before(unit % group_units),
        groups_per_step(step / group_units),
        units_per_step(step % group_units),
        group_units(group_units) {}
  __device__ __forceinline__ void advance() {
    group += groups_per_step, before += units_per_step;
    if (before >= group_units) before -= group_units, group++;
  }
};

// A stage of shared memory holds units of one 64-row block and all that their scales need, in
// pieces that are contiguous in global memory and here and multiples of 64 bytes. Stages start at
// multiples of their units.
struct StageLayout {
  int groups;                                // that a stage has room for: all it may touch
  int all_groups;                            // of a row of the weight
  int scale_bytes, zero_bytes;               // of one row in a group; zero_bytes 0: there are none
  int scale, zero, block_scale, block_zero;  // byte offsets; codes are at 0
  int bytes;                                 // a multiple of 128
  int floats;                                // of the scales, once they are converted: scales_at
};
// Floats that a pair of rows h = 0, 1 has in a group (convert_scales).
constexpr int scale_entry(bool symmetric) { return symmetric ? 2 : 4; }
inline StageLayout stage_layout(const Weight& w, int units) {
  const int group_units = w.group / layout::kUnitCols;
  StageLayout s{};
  s.groups = units % group_units == 0   ? units / group_units
             : group_units % units == 0 ? 1
                                        : (units + group_units - 2) / group_units + 1;
  s.all_groups = int(w.kp / w.group);
  s.scale_bytes = scale_size(w.scale_kind);
  s.zero_bytes = w.zero == nullptr ? 0 : w.zero_kind == Zero::integer ? 1 : s.scale_bytes;
  s.scale = units * int(layout::unit_bytes(w.bits));
  s.zero = s.scale + s.groups * 64 * s.scale_bytes;
  s.block_scale = s.zero + s.groups * 64 * s.zero_bytes;
  s.block_zero = s.block_scale + (w.block_scale ? 128 : 0);
  s.bytes = int(layout::round_up(s.block_zero + (w.block_zero ? 128 : 0), 128));
  s.floats = s.groups * 32 * scale_entry(w.zero_kind == Zero::symmetric);
  return s;
}

// Calls piece(offset in the stage, from, bytes) for what `units` units from `first` on of row block
// `block` need, which start in group `group`. With scales of two levels all lie in one block of 256
// columns.
template <class C, class F>
__device__ __forceinline__ void for_pieces(const Weight& w, const StageLayout& s, int64_t block,
                                           int first, int units, int group, const F& piece) {
  const int all = int(w.kp / layout::kUnitCols);
  piece(0, w.codes + (block * all + first) * C::unit_bytes, units * C::unit_bytes);
  const int left = s.all_groups - group, rows = (left < s.groups ? left : s.groups) * 64;
  const int64_t at = (block * s.all_groups + group) * 64;
  piece(s.scale, static_cast<const uint8_t*>(w.scale) + at * s.scale_bytes, rows * s.scale_bytes);
  if (w.zero)
    piece(s.zero, static_cast<const uint8_t*>(w.zero) + at * s.zero_bytes, rows * s.zero_bytes);
  if (w.block_scale) {
    const int64_t i = (block * (all / 16) + first / 16) * 64;
    piece(s.block_scale, w.block_scale + i, 128);
    if (w.block_zero) piece(s.block_zero, w.block_zero + i, 128);
  }
}

// ---- scales ----

// Stored flat scales or minima of two rows, the first even, at byte `at` of their group's.
__device__ __forceinline__ void two_flat(Scale kind, const uint8_t* scales, int i,
                                         float (&out)[2]) {
  if (kind == Scale::f16 || kind == Scale::bf16) {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(scales + 2 * i);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto bits = uint16_t(v >> 16 * r);
      out[r] = kind == Scale::f16 ? widen(from_bits<half_t>(bits)) : widen(from_bits<bf16_t>(bits));
    }
  } else if (kind == Scale::f32) {
    const Words2 v = *reinterpret_cast<const Words2*>(scales + 4 * i);
#pragma unroll
    for (int r = 0; r < 2; r++) out[r] = bits_float(int32_t(v.word[r]));
  } else {
    const uint16_t v = *reinterpret_cast<const uint16_t*>(scales + i);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto byte = uint8_t(v >> 8 * r);
      out[r] = kind == Scale::e8m0 ? e8m0_to_float(byte) : e4m3_to_float(byte);
    }
  }
}

// The scales of a stage as sums need them: for every group, floats [e][4 q + c][...] of rows
// 32 q + 16 h + 4 c + e, with for both h what multiplies the products; and in weights that are not
// symmetric then for both h what multiplies the sum of x, before the scale (zero points) or beside
// it (minima). So a lane has all for a row tile e in one load, and a warp reads 8 neighbours.
// Each lane converts two rows of every group; the warp reads them after a warp_sync.
template <class T, class C>
__device__ __forceinline__ void convert_scales(const Weight& w, const StageLayout& s,
                                               const uint8_t* stage, int group, int lane,
                                               float* out) {
  const int left = s.all_groups - group, groups = left < s.groups ? left : s.groups;
  const float upper = Magic<T, C>::upper_factor;
  const int h = lane / 8 % 2, first_tile = 2 * lane % 4;  // of rows 2 lane, 2 lane + 1
  const float factor = h ? upper : 1.f, inverse = h ? 1 / upper : 1.f;
  const bool symmetric = w.zero_kind == Zero::symmetric;
  const int entry = scale_entry(symmetric);
  out += (lane / 16 * 4 + lane / 2 % 4) * entry + h;
  const bool nibbles = w.scale_kind == Scale::two_nibble, minima = w.zero_kind == Zero::minimum;
  float block[2], block_zero[2];
  if (w.block_scale) {
    two_flat(Scale::f16, stage + s.block_scale, 2 * lane, block);
    if (minima) two_flat(Scale::f16, stage + s.block_zero, 2 * lane, block_zero);
  }
#pragma unroll 1
  for (int g = 0; g < groups; g++) {
    const int i = g * 64 + 2 * lane;
    float scale[2], zero[2];
    if (w.block_scale) {
      const uint16_t stored = *reinterpret_cast<const uint16_t*>(stage + s.scale + i);
      const auto integer = [nibbles](uint16_t v, int r) {
        const auto byte = uint8_t(v >> 8 * r);
        return float(nibbles ? byte & 15 : int(int8_t(byte)));
      };
#pragma unroll
      for (int r = 0; r < 2; r++) scale[r] = block[r] * integer(stored, r);
      if (minima) {
        const uint16_t minimum = nibbles ? uint16_t(stored >> 4)
                                         : *reinterpret_cast<const uint16_t*>(stage + s.zero + i);
#pragma unroll
        for (int r = 0; r < 2; r++) zero[r] = block_zero[r] * integer(minimum, r);
      }
    } else {
      two_flat(w.scale_kind, stage + s.scale, i, scale);
      if (minima) two_flat(w.scale_kind, stage + s.zero, i, zero);
    }
    if (w.zero_kind == Zero::integer) {
      const uint16_t v = *reinterpret_cast<const uint16_t*>(stage + s.zero + i);
#pragma unroll
      for (int r = 0; r < 2; r++) zero[r] = factor * float(v >> 8 * r & 255);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float* to = out + (g * 32 + (first_tile + r) * 8) * entry;
      to[0] = scale[r] * inverse;
      if (!symmetric) to[2] = -zero[r];
    }
  }
}

// ---- sums ----

template <int kValue>
struct Index {
  static constexpr int value = kValue;
};
template <Zero kZero>
struct ZeroKind {
  static constexpr Zero value = kZero;
};

// A warp's sums of 64 rows by 8 kTiles tokens: total[i][e][2 h + j] is of row 32 q + 16 h + 4 c + e
// and token 8 i + 2 t + j. Units go in spans, of two where groups are whole pairs of them: products
// start from what takes the powers of two away that codes were added to, and leave with the scale.
template <class T, class C, int kTiles>
struct UnitSums {
  using M = Magic<T, C>;
  float total[kTiles][4][4] = {};

  // A operands whose product takes away what was added to the codes: in symmetric weights the zero
  // point too. Otherwise the rows of h = 1 are ones, and give the sums of x.
  uint32_t offset[2];
  __device__ __forceinline__ explicit UnitSums(const Weight& w) {
    const bool symmetric = w.zero_kind == Zero::symmetric;
    constexpr float zero = C::table ? 128 : 1 << (C::bits - 1);  // of a table: bytes value + 128
    offset[0] = twice(symmetric ? -(M::added + zero) : -M::added);
    offset[1] = twice(symmetric ? -(M::added + M::upper_factor * zero) : 1.f);
  }
  __device__ __forceinline__ static uint32_t twice(float v) { return narrow_pair<T>(v, v); }

  // A span of kUnits units. b(u, i): activations of its unit u and token tile i; scales: of its
  // group, as convert_scales leaves them, from this lane's entries on.
  template <int kUnits, Zero kZero, class F>
  __device__ __forceinline__ void add_span(const uint8_t* codes, const float* scales, int lane,
                                           const TableWords& table, const F& activations) {
    constexpr bool symmetric = kZero == Zero::symmetric;
    const uint32_t offsets[4] = {offset[0], offset[1], offset[0], offset[1]};
    LaneUnit<C> units[kUnits];
    Words2 b[kUnits][kTiles];
    float start[kTiles][4] = {};
    float x[kTiles][2];
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      units[u] = load_unit<C>(codes + u * C::unit_bytes, lane);
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        b[u][i] = activations(u, i);
        mma_16816<T>(start[i], offsets, b[u][i].word[0], b[u][i].word[1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      x[i][0] = start[i][2], x[i][1] = start[i][3];
      if (!symmetric) start[i][2] = start[i][0], start[i][3] = start[i][1];
    }
    const auto row_tile = [&](auto e_) {
      constexpr int e = decltype(e_)::value;
      float d[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) d[i][j] = start[i][j];
#pragma unroll
      for (int u = 0; u < kUnits; u++) {
        uint32_t a[M::products][4];
        fragments<T, C, e>(units[u], table, a);
#pragma unroll
        for (int p = 0; p < M::products; p++)
#pragma unroll
          for (int i = 0; i < kTiles; i++)
            mma_16816<T>(d[i], a[p], b[u][i].word[0], b[u][i].word[1]);
      }
      float scale[2], zero[2] = {};
      if constexpr (symmetric) {
        const Words2 v = *reinterpret_cast<const Words2*>(scales + e * 16);
        scale[0] = bits_float(int32_t(v.word[0])), scale[1] = bits_float(int32_t(v.word[1]));
      } else {
        const Words4 v = *reinterpret_cast<const Words4*>(scales + e * 32);
        scale[0] = bits_float(int32_t(v.word[0])), scale[1] = bits_float(int32_t(v.word[1]));
        zero[0] = bits_float(int32_t(v.word[2])), zero[1] = bits_float(int32_t(v.word[3]));
      }
#pragma unroll
      for (int i = 0; i < kTiles; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float& sum = total[i][e][j];
          if (kZero == Zero::integer) d[i][j] = fma(x[i][j % 2], zero[j / 2], d[i][j]);
          sum = fma(d[i][j], scale[j / 2], sum);
          if (kZero == Zero::minimum) sum = fma(x[i][j % 2], zero[j / 2], sum);
        }
    };
    row_tile(Index<0>{}), row_tile(Index<1>{}), row_tile(Index<2>{}), row_tile(Index<3>{});
  }
  template <int kUnits, Zero kZero, class F>
  __device__ __forceinline__ void add_spans(const uint8_t* stage, const float* scales, int left,
                                            int group_units, int from, int to, int lane,
                                            const TableWords& table, const F& b) {
    constexpr int group_floats = 32 * scale_entry(kZero == Zero::symmetric);
    while (left <= 0) left += group_units, scales += group_floats;
    scales += lane / 4 * (group_floats / 32);  // lane / 4 is 4 q + c
#pragma unroll 1
    for (int unit = from; unit < to; unit += kUnits) {
      add_span<kUnits, kZero>(stage + unit * C::unit_bytes, scales, lane, table,
                              [&](int u, int i) { return b(unit + u, i); });
      left -= kUnits;
      if (left == 0) left = group_units, scales += group_floats;
    }
  }

  // Units [from, to) of a stage, counted from its start; `at` is the stage's place among the groups
  // and scales what convert_scales made of it. b(unit, i) gives activations.
  template <class F>
  __device__ __forceinline__ void add_units(const Weight& w, const uint8_t* stage,
                                            const GroupCursor& at, const float* scales, int from,
                                            int to, int lane, const TableWords& table, const F& b) {
    const int left = at.group_units - at.before - from;  // units of the group from here on
    const bool in_pairs = at.group_units % 2 == 0;
    const auto spans = [&](auto units, auto zero) {
      add_spans<decltype(units)::value, decltype(zero)::value>(stage, scales, left, at.group_units,
                                                               from, to, lane, table, b);
    };
    const auto of_zero = [&](auto zero) {
      if (in_pairs) spans(Index<2>{}, zero);
      else spans(Index<1>{}, zero);
    };
    if (C::table || w.zero_kind == Zero::symmetric) return of_zero(ZeroKind<Zero::symmetric>{});
    if constexpr (!C::table) {
      if (w.zero_kind == Zero::integer) of_zero(ZeroKind<Zero::integer>{});
      else of_zero(ZeroKind<Zero::minimum>{});
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
  // An ordinary load: the kernel that makes x may still run when this one starts.
  if (vectors && column + 8 <= args.w.k) return *reinterpret_cast<const Words4*>(x + column);
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
  device_fence();  // behind the count, as the memory model has it
  for (int i = int(threadIdx.x); i < used; i += int(blockDim.x)) {
    float sum = 0;
    for (int p = 0; p < split.splits; p++)
      sum += load_other_block(split.partial + (p * tiles + tile) * size + i);
    write(i, sum);
  }
}

}  // namespace qk
