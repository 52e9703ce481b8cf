// linear for more tokens than linear_gemv.cuh takes: a block of 8 warps computes 256 rows by 64
// tokens over a part of K, each warp 64 rows by 32 tokens; with up to 32 tokens, two warps share
// their 64 rows by 32 tokens and split K between them:
//
//   warp = 4 * half + row_block      half: of the tokens, or of every stage's units
//
// Weights and activations of 4 units (64 columns) come in stages that all warps share, by 16-byte
// asynchronous copies, kTileStages of them. A lane needs x[4 t .. 4 t + 3] of token g, 8 bytes as
// they lie in memory; ldmatrix gives it x[2 t], x[2 t + 1], which is not what its codes meet. Rows
// of x are 128 bytes in 8 chunks of 16; chunk c of token m is at c ^ 2 (m % 4), so that the 8 bytes
// of 4 tokens by 4 t, which a half-warp reads at once, fall into different banks.
//
// 64 total sums and 64 of a group take 128 registers of a thread: with all else over 128, so there
// is one block on a multiprocessor. Sums of 16 tokens would leave room for two, and decode every
// code twice as often: 5 instructions for every matrix product instead of 3.6, where a warp
// scheduler gives one product every 3 to 4 cycles.
#pragma once
#include "linear_units.cuh"

namespace qk {

constexpr int kTileThreads = 256, kTileRowBlocks = 4, kTileStages = 3, kTileUnits = 4;
constexpr int kTileRows = kTileRowBlocks * layout::kUnitRows, kTileWarpTokens = 32;
constexpr int kTileRowBytes = kTileUnits * 32;  // of x

struct TilePlan {
  bool halve_k;          // up to 32 tokens in a block; else up to 64
  bool vectors;          // x is copied 16 bytes at a time
  int stages_per_split;  // of K, a block's part
  StageLayout stage;     // of the weights of one row block
  int stage_bytes;       // of the block: 4 of the above, then x
  // Byte offsets in shared memory: stages at 0, then scales and flag.
  int scales, last, shared_bytes;
  TileSplit split;
  int64_t row_tiles, token_tiles;
};

template <class T, class C>
__global__ void __launch_bounds__(kTileThreads, 1)
    linear_tile_kernel(const LinearArgs args, const TilePlan plan) {
  uint8_t* shared = shared_memory<uint8_t>();
  const Weight& w = args.w;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row_block = warp % kTileRowBlocks, half = warp / kTileRowBlocks;
  // Tiles of tokens follow each other: the second finds the weights in L2.
  const int64_t row_tile = blockIdx.x / plan.token_tiles,
                token_tile = blockIdx.x % plan.token_tiles;
  const int tokens = plan.halve_k ? kTileWarpTokens : 2 * kTileWarpTokens;
  const int64_t first_token = token_tile * tokens;
  const int all_units = int(w.kp / layout::kUnitCols);
  const int all_stages = (all_units + kTileUnits - 1) / kTileUnits;
  const int first_stage = int(blockIdx.y) * plan.stages_per_split;
  int end_stage = first_stage + plan.stages_per_split;
  end_stage = end_stage < all_stages ? end_stage : all_stages;
  const int64_t all_blocks = (w.n + layout::kUnitRows - 1) / layout::kUnitRows;
  const int64_t first_block = row_tile * kTileRowBlocks;
  const bool has_rows = first_block + row_block < all_blocks;
  const int x_at = kTileRowBlocks * plan.stage.bytes;
  const auto units_of = [&](int stage) {
    const int left = all_units - stage * kTileUnits;
    return left < kTileUnits ? left : kTileUnits;
  };

  const int group_units = w.group / layout::kUnitCols;
  GroupCursor issued(first_stage * kTileUnits, kTileUnits, group_units), read = issued;
  const auto issue = [&](int stage) {
    if (stage < end_stage) {
      uint8_t* to = shared + stage % kTileStages * plan.stage_bytes;
      const int first = stage * kTileUnits, units = units_of(stage);
      // The two warps of a row block copy its weights, every second 16 bytes each.
      if (has_rows)
        for_pieces<C>(w, plan.stage, first_block + row_block, first, units, issued.group,
                      [&](int at, const void* from, int size) {
                        uint8_t* piece = to + row_block * plan.stage.bytes + at;
                        for (int b = 16 * (2 * lane + half); b < size; b += 16 * 64)
                          copy_async<16>(piece + b, static_cast<const uint8_t*>(from) + b);
                      });
      for (int p = int(threadIdx.x); p < tokens * kTileUnits * 2; p += kTileThreads) {
        const int token = p / (kTileUnits * 2), chunk = p % (kTileUnits * 2);
        uint8_t* at = to + x_at + token * kTileRowBytes + 16 * (chunk ^ 2 * (token % 4));
        const int64_t m = first_token + token, column = int64_t(first) * 16 + chunk * 8;
        const int64_t left = w.k - column;
        const bool there = m < args.m && left > 0;
        if (!plan.vectors) {
          Words4 x{};
          if (there) x = eight_activations<T>(args, false, m, column);
          *reinterpret_cast<Words4*>(at) = x;
          continue;
        }
        // Of 0 bytes nothing is read, wherever they would lie.
        copy_async<16>(at, static_cast<const T*>(args.x) + m * args.x_stride + column,
                       there ? int(left < 8 ? left : 8) * 2 : 0);
      }
    }
    copy_commit();
    issued.advance();
  };

  dependency_wait();
  TableWords table{};
  if constexpr (C::table) table = load_table(w.table);
  for (int i = 0; i < kTileStages - 1; i++) issue(first_stage + i);

  UnitSums<T, C, kTileWarpTokens / 8> sums(w);
  // Each warp converts for itself: two may share their rows, but not their time.
  auto* scales = reinterpret_cast<float*>(shared + plan.scales) + warp * plan.stage.floats;
  const int g = lane / 4, t = lane % 4;
  const int first_row = (plan.halve_k ? 0 : half * kTileWarpTokens) + g;
  for (int stage = first_stage; stage < end_stage; stage++) {
    copy_wait<kTileStages - 2>();
    block_sync();  // the stage is there for all, and all have read the one before it
    issue(stage + kTileStages - 1);
    if (!has_rows) continue;
    const uint8_t* at = shared + stage % kTileStages * plan.stage_bytes;
    const uint8_t* x = at + x_at + first_row * kTileRowBytes;
    constexpr int most = kTileUnits / 2;  // units of the first of two warps
    const int units = units_of(stage), middle = units < most ? units : most;
    const int from = plan.halve_k && half == 1 ? middle : 0;
    const int to = plan.halve_k && half == 0 ? middle : units;
    const uint8_t* weights = at + row_block * plan.stage.bytes;
    convert_scales<T, C>(w, plan.stage, weights, read.group, lane, scales);
    warp_sync();
    sums.add_units(w, weights, read, scales, from, to, lane, table, [&](int unit, int tile) {
      const int chunk = unit * 2 + t / 2;
      return pair_columns(*reinterpret_cast<const Words2*>(x + tile * 8 * kTileRowBytes +
                                                           16 * (chunk ^ 2 * (g % 4)) + t % 2 * 8));
    });
    read.advance();
  }
  dependency_launch();

  block_sync();  // the stages are read, and become sums [halves of K, tokens, rows]
  auto* parts = reinterpret_cast<float*>(shared);
  const int row = row_block * 64 + lane / 16 * 32 + lane / 4 % 4 * 4;
  const int part_token = plan.halve_k ? half * tokens : half * kTileWarpTokens;
#pragma unroll
  for (int tile = 0; tile < kTileWarpTokens / 8; tile++)
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Words4 four;
#pragma unroll
        for (int e = 0; e < 4; e++)
          four.word[e] = uint32_t(float_bits(sums.total[tile][e][2 * h + j]));
        const int token = part_token + 8 * tile + 2 * t + j;
        *reinterpret_cast<Words4*>(parts + token * kTileRows + row + 16 * h) = four;
      }
  block_sync();
  store_tile<T>(args, plan.split, parts, plan.halve_k ? 2 : 1, tokens, kTileRows, first_token,
                row_tile * kTileRows, blockIdx.x, plan.row_tiles * plan.token_tiles,
                int(blockIdx.y), reinterpret_cast<int32_t*>(shared + plan.last));
}

}  // namespace qk
