// Which kernel multiplies float16 and bfloat16 activations, and how a matrix is cut for it.
#pragma once
#include "launchers.h"
#include "linear_gemv.cuh"
#include "linear_tile.cuh"

namespace qk {

struct LinearFloatPlan {
  bool decode;  // gemv, else tile
  GemvPlan gemv;
  TilePlan tile;
  int64_t partial_floats;  // of scratch
};

// Into how many parts K is cut: the fewest that keep 95% of the multiprocessors' time in use, or
// else those that come nearest. A multiprocessor takes as long as its blocks have stages, whether
// they run at once or one after another: one is enough to keep its share of the memory busy.
//   tiles: of y; stages: of K; least: stages that a part must have
inline int choose_splits(int64_t tiles, int64_t multiprocessors, int64_t stages, int64_t least) {
  const bool counters_suffice = tiles <= kLinearCounters;
  const int64_t most = counters_suffice ? stages / least : 1;
  int best = 1;
  double best_use = 0;
  for (int64_t s = 1; s <= most && s <= 128; s++) {
    const int64_t part = (stages + s - 1) / s;
    if ((stages + part - 1) / part != s) continue;  // the last part would be empty
    const int64_t blocks_of_one = (tiles * s + multiprocessors - 1) / multiprocessors;
    const double use = double(tiles * stages) / double(multiprocessors * blocks_of_one * part);
    if (use > best_use) best = int(s), best_use = use;
    if (use >= 0.95) break;
  }
  return best;
}

constexpr int kSharedReserved = 1024;  // of every block, by the driver

inline bool x_in_vectors(const LinearArgs& a) {
  const bool rows_aligned = a.m == 1 || a.x_stride % 8 == 0;
  return rows_aligned && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
}

// False if it does not fit into shared memory.
inline bool plan_gemv(const LinearArgs& a, const DeviceLimits& limits, GemvPlan* out) {
  GemvPlan& p = *out;
  // Activations cost 2 m / 64 rows of every column; more rows in a block read them less often.
  p.row_blocks = a.m <= 4 ? 1 : a.m <= 8 ? 2 : 4;
  p.k_warps = kGemvWarps / p.row_blocks;
  p.vectors = x_in_vectors(a);
  const int units = gemv_units(a.w.bits);
  p.stage = stage_layout(a.w, units);
  const int tiles = a.m <= 8 ? 1 : 2, stages = gemv_stages(tiles);
  const int rings = kGemvWarps * stages * p.stage.bytes;
  const int parts = kGemvWarps * layout::kUnitRows * int(a.m) * 4;
  p.mbarriers = rings > parts ? rings : parts;
  p.last = p.mbarriers + kGemvWarps * stages * 8;
  p.scales = int(layout::round_up(p.last + 4, 128));
  p.activations = p.scales + kGemvWarps * p.stage.floats * 4;

  const int round = int(a.m) * units * 32 * p.k_warps;  // bytes of x that every warp's stage needs
  const int half = limits.shared_per_multiprocessor / 2 - kSharedReserved - p.activations;
  const bool two_blocks = gemv_blocks(tiles) == 2 && half >= 2 * round;
  const int most = limits.shared_per_block - p.activations;
  const int budget = two_blocks ? half : most;
  if (budget < round) return false;

  const int64_t all_stages = (a.w.kp / layout::kUnitCols + units - 1) / units;
  const int64_t blocks = (a.w.n + layout::kUnitRows - 1) / layout::kUnitRows;
  p.row_tiles = (blocks + p.row_blocks - 1) / p.row_blocks;
  p.split.splits = choose_splits(p.row_tiles, limits.multiprocessors, all_stages, 2 * p.k_warps);
  p.stages_per_split = int((all_stages + p.split.splits - 1) / p.split.splits);
  const int64_t rounds = (p.stages_per_split + p.k_warps - 1) / p.k_warps;
  const int64_t fitting = budget / round;
  const int64_t rounds_per_segment = rounds < fitting ? rounds : fitting;
  p.stages_per_segment = int(rounds_per_segment) * p.k_warps;
  p.shared_bytes = p.activations + int(rounds_per_segment) * round;
  return true;
}

inline void plan_tile(const LinearArgs& a, const DeviceLimits& limits, TilePlan* out) {
  TilePlan& p = *out;
  p.halve_k = a.m <= kTileWarpTokens;
  const int tokens = p.halve_k ? kTileWarpTokens : 2 * kTileWarpTokens;
  p.vectors = x_in_vectors(a);
  p.stage = stage_layout(a.w, kTileUnits);
  p.stage_bytes = kTileRowBlocks * p.stage.bytes + tokens * kTileRowBytes;
  const int stages = kTileStages * p.stage_bytes;
  const int parts = 2 * kTileWarpTokens * kTileRows * 4;  // two halves, of tokens or of K
  p.scales = stages > parts ? stages : parts;
  p.last = p.scales + kTileThreads / 32 * p.stage.floats * 4;
  p.shared_bytes = p.last + 4;
  const int64_t all_stages = (a.w.kp / layout::kUnitCols + kTileUnits - 1) / kTileUnits;
  p.row_tiles = (a.w.n + kTileRows - 1) / kTileRows;
  p.token_tiles = (a.m + tokens - 1) / tokens;
  p.split.splits =
      choose_splits(p.row_tiles * p.token_tiles, limits.multiprocessors, all_stages, 4);
  p.stages_per_split = int((all_stages + p.split.splits - 1) / p.split.splits);
}

inline LinearFloatPlan plan_linear_float(const LinearArgs& a, const DeviceLimits& limits) {
  LinearFloatPlan p{};
  p.decode = a.m <= kGemvTokens && plan_gemv(a, limits, &p.gemv);
  if (p.decode) {
    const int64_t tile = a.m * p.gemv.row_blocks * layout::kUnitRows;
    if (p.gemv.split.splits > 1) p.partial_floats = p.gemv.split.splits * p.gemv.row_tiles * tile;
    return p;
  }
  plan_tile(a, limits, &p.tile);
  const int64_t tile = int64_t(p.tile.halve_k ? 1 : 2) * kTileWarpTokens * kTileRows;
  if (p.tile.split.splits > 1)
    p.partial_floats = p.tile.split.splits * p.tile.row_tiles * p.tile.token_tiles * tile;
  return p;
}

// Of one kind of codes; each is instantiated in a translation unit of its own (linear_float_w4.cu).
template <class C, class T>
cudaError_t launch_linear_typed(const LinearArgs& args, const LinearFloatPlan& plan,
                                cudaStream_t stream) {
  if (plan.decode) {
    const GemvPlan& p = plan.gemv;
    const dim3 grid(unsigned(p.row_tiles), unsigned(p.split.splits));
    const bool one_tile = args.m <= 8;
    return launch_dependent(one_tile ? linear_gemv_kernel<T, C, 1> : linear_gemv_kernel<T, C, 2>,
                            grid, dim3(kGemvThreads), size_t(p.shared_bytes), stream, args, p);
  }
  const TilePlan& p = plan.tile;
  const dim3 grid(unsigned(p.row_tiles * p.token_tiles), unsigned(p.split.splits));
  return launch_dependent(linear_tile_kernel<T, C>, grid, dim3(kTileThreads),
                          size_t(p.shared_bytes), stream, args, p);
}
template <class C>
cudaError_t launch_linear_codes(const LinearArgs& args, const LinearFloatPlan& plan,
                                cudaStream_t stream) {
  return args.x_type == Dtype::f16 ? launch_linear_typed<C, half_t>(args, plan, stream)
                                   : launch_linear_typed<C, bf16_t>(args, plan, stream);
}

}  // namespace qk
