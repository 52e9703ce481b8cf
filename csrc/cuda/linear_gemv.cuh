// linear for up to 16 tokens, where reading the weights is all that should take time.
//
// A block of 8 warps computes 64 row_blocks rows for all tokens over a part of K: warp (rb, wk) has
// 64 rows and every k_warps-th stage of that part. Each warp has a ring of a few stages of its
// own, so that no warp waits for another while weights arrive:
//
//   sm_90   one lane asks for a stage with a few bulk copies, which an mbarrier counts
//   sm_80   every lane copies 16 bytes at a time, in groups
//
// Weights are asked for before the kernel waits for its predecessor, which writes x. x [M, K part]
// lies in shared memory as operands,
//
//   activations[unit][token][t] = (x[4 t], x[4 t + 2]), (x[4 t + 1], x[4 t + 3]) of the unit's 16
//
// whole where it fits, else in segments of K with a barrier between them. The warps' sums meet in
// shared memory and those of blocks in global memory, in a fixed order.
#pragma once
#include "linear_units.cuh"

namespace qk {

constexpr int kGemvWarps = 8, kGemvThreads = 32 * kGemvWarps, kGemvTokens = 16;
// With one tile of 8 tokens there are two blocks on a multiprocessor. Two tiles need more than the
// 128 registers which that allows (16 to 24 bytes would spill), so there is one block, and its
// rings are longer: 8 warps with 2 stages on their way, for 16 warps with one. That is 64 KB, of
// which 4.3 TB/s and 0.8 us need 26 KB.
constexpr int gemv_blocks(int tiles) { return tiles == 1 ? 2 : 1; }
constexpr int gemv_stages(int tiles) { return tiles == 1 ? 2 : 3; }
// Units of a stage: 2 to 4 KB of codes. Both divide the 16 units of a block of two-level scales.
constexpr int gemv_units(int bits) { return bits <= 4 ? 8 : 4; }

struct GemvPlan {
  int row_blocks, k_warps;  // row_blocks * k_warps = kGemvWarps
  int stages_per_split;     // of K, a block's part
  int stages_per_segment;   // of x in shared memory at a time; a multiple of k_warps
  bool vectors;             // x is read 16 bytes at a time
  StageLayout stage;
  // Byte offsets in shared memory: rings at 0, then mbarriers, flag, scales and activations.
  int mbarriers, last, scales, activations, shared_bytes;
  TileSplit split;
  int64_t row_tiles;
};

// How a warp's stages come into its ring; all lanes call everything together.
template <int kStages>
struct StageRing {
  uint8_t* stages;      // [kStages, bytes]
  uint64_t* mbarriers;  // [kStages]
  bool bulk;

  __device__ __forceinline__ void start(int lane) {
    if (!bulk) return;
    if (lane == 0) {
      for (int i = 0; i < kStages; i++) mbarrier_init(mbarriers + i);
      mbarrier_init_fence();
    }
    warp_sync();
  }
  // Stage i of the warp goes to slot i % kStages, whose last contents all lanes have read.
  template <class C>
  __device__ __forceinline__ void issue(const Weight& w, const StageLayout& s, int64_t block,
                                        int first, int units, int group, int i, int lane) {
    uint8_t* to = stages + i % kStages * s.bytes;
    if (bulk) {
      if (lane == 0) {
        uint64_t* mbarrier = mbarriers + i % kStages;
        uint32_t bytes = 0;
        for_pieces<C>(w, s, block, first, units, group,
                      [&](int, const void*, int size) { bytes += uint32_t(size); });
        mbarrier_expect(mbarrier, bytes);
        for_pieces<C>(w, s, block, first, units, group, [&](int at, const void* from, int size) {
          bulk_load(to + at, from, uint32_t(size), mbarrier);
        });
      }
      return;
    }
    for_pieces<C>(w, s, block, first, units, group, [&](int at, const void* from, int size) {
      for (int b = 16 * lane; b < size; b += 16 * 32)
        copy_async<16>(to + at + b, static_cast<const uint8_t*>(from) + b);
    });
  }
  // Behind every issue, also one that was left out because there is no stage i.
  __device__ __forceinline__ void close_issue() {
    if (!bulk) copy_commit();
  }
  __device__ __forceinline__ const uint8_t* wait(int i, const StageLayout& s) {
    if (bulk) {
      mbarrier_wait(mbarriers + i % kStages, i / kStages & 1);
    } else {
      copy_wait<kStages - 1>();
    }
    warp_sync();  // lanes leave either wait on their own
    return stages + i % kStages * s.bytes;
  }
};

template <class T, class C, int kTiles>
__global__ void __launch_bounds__(kGemvThreads, gemv_blocks(kTiles))
    linear_gemv_kernel(const LinearArgs args, const GemvPlan plan) {
  constexpr int kUnits = gemv_units(C::bits), kStages = gemv_stages(kTiles);
  uint8_t* shared = shared_memory<uint8_t>();
  auto* activations = reinterpret_cast<Words2*>(shared + plan.activations);
  const Weight& w = args.w;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row_block = warp / plan.k_warps, k_warp = warp % plan.k_warps;
  const int64_t block = int64_t(blockIdx.x) * plan.row_blocks + row_block;
  const int all_units = int(w.kp / layout::kUnitCols);
  const int all_stages = (all_units + kUnits - 1) / kUnits;
  const int first_stage = int(blockIdx.y) * plan.stages_per_split;
  int end_stage = first_stage + plan.stages_per_split;
  end_stage = end_stage < all_stages ? end_stage : all_stages;
  const bool has_rows = block * layout::kUnitRows < w.n;
  const int tokens = int(args.m);

  StageRing<kStages> ring{shared + warp * kStages * plan.stage.bytes,
                          reinterpret_cast<uint64_t*>(shared + plan.mbarriers) + warp * kStages,
                          bulk_copies()};
  const auto units_of = [&](int stage) {
    const int left = all_units - stage * kUnits;
    return left < kUnits ? left : kUnits;
  };
  GroupCursor at((first_stage + k_warp) * kUnits, plan.k_warps * kUnits,
                 w.group / layout::kUnitCols);
  const auto issue = [&](int i, const GroupCursor& from) {
    const int stage = first_stage + k_warp + i * plan.k_warps;
    if (has_rows && stage < end_stage)
      ring.template issue<C>(w, plan.stage, block, stage * kUnits, units_of(stage), from.group, i,
                             lane);
    ring.close_issue();
  };
  ring.start(lane);
  if (!args.weights_settled) dependency_wait();
  GroupCursor ahead = at;
#pragma unroll 1
  for (int i = 0; i < kStages; i++, ahead.advance()) issue(i, ahead);
  TableWords table{};
  if constexpr (C::table) table = load_table(w.table);
  dependency_wait();

  UnitSums<T, C, kTiles> sums(w);
  auto* scales = reinterpret_cast<float*>(shared + plan.scales) + warp * plan.stage.floats;
  const int g = lane / 4, t = lane % 4;
  int row_of[kTiles];  // tokens that are not there read the last one, and are not stored
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
    const int token = 8 * i + g;
    row_of[i] = (token < tokens ? token : tokens - 1) * 4 + t;
  }

  int i = 0;
  for (int segment = first_stage; segment < end_stage; segment += plan.stages_per_segment) {
    const int rest = end_stage - segment;
    const int segment_end =
        segment + (rest < plan.stages_per_segment ? rest : plan.stages_per_segment);
    if (segment > first_stage) block_sync();  // all have read the segment before
    const int first_unit = segment * kUnits;
    // Two pieces of 8 columns in a unit: t = 0, 1 and t = 2, 3. Beyond K they are zeros.
    const int pieces = 2 * kUnits * (segment_end - segment);
    for (int p = int(threadIdx.x); p < pieces * tokens; p += kGemvThreads) {
      const int token = p / pieces, piece = p % pieces;
      const Words4 x =
          eight_activations<T>(args, plan.vectors, token, int64_t(first_unit) * 16 + piece * 8);
      const Words2 low = pair_columns({{x.word[0], x.word[1]}}),
                   high = pair_columns({{x.word[2], x.word[3]}});
      *reinterpret_cast<Words4*>(activations + (piece / 2 * tokens + token) * 4 + piece % 2 * 2) = {
          {low.word[0], low.word[1], high.word[0], high.word[1]}};
    }
    block_sync();
    for (int stage; has_rows && (stage = first_stage + k_warp + i * plan.k_warps) < segment_end;
         i++) {
      const uint8_t* codes = ring.wait(i, plan.stage);
      convert_scales<T, C>(w, plan.stage, codes, at.group, lane, scales);
      warp_sync();
      const Words2* x = activations + (stage * kUnits - first_unit) * tokens * 4;
      sums.add_units(w, codes, at, scales, 0, units_of(stage), lane, table,
                     [&](int unit, int tile) { return x[unit * tokens * 4 + row_of[tile]]; });
      warp_sync();
      at.advance();
      ahead = at;
#pragma unroll
      for (int j = 1; j < kStages; j++) ahead.advance();
      issue(i + kStages, ahead);
    }
  }
  dependency_launch();

  block_sync();  // the rings are read, and become sums [k_warps, tokens, rows]
  auto* parts = reinterpret_cast<float*>(shared);
  const int rows = plan.row_blocks * layout::kUnitRows;
  const int row = row_block * 64 + lane / 16 * 32 + lane / 4 % 4 * 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int token = 8 * tile + 2 * t + j;
      if (token >= tokens) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Words4 four;
#pragma unroll
        for (int e = 0; e < 4; e++)
          four.word[e] = uint32_t(float_bits(sums.total[tile][e][2 * h + j]));
        *reinterpret_cast<Words4*>(parts + (k_warp * tokens + token) * rows + row + 16 * h) = four;
      }
    }
  block_sync();
  store_tile<T>(args, plan.split, parts, plan.k_warps, tokens, rows, 0, int64_t(blockIdx.x) * rows,
                blockIdx.x, plan.row_tiles, int(blockIdx.y),
                reinterpret_cast<int32_t*>(shared + plan.last));
}

}  // namespace qk
