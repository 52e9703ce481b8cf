// Which kernel runs linear of int8 activations, on how many blocks. Torch-free.
#include "linear_int8.cuh"

#include "linear_int8_decode.cuh"
#include "linear_int8_tile.cuh"

namespace qk {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most so many groups meet in `chunk` units that start at a multiple of it.
int groups_of_chunk(int chunk, int group_units) {
  if (group_units % chunk == 0) return 1;
  if (chunk % group_units == 0) return chunk / group_units;
  return (chunk - 2) / group_units + 2;
}

// The part of a row block in a stage.
void lay_out_block(const Weight& w, int chunk, bool scales, Int8Plan* p) {
  const int groups = scales ? groups_of_chunk(chunk, p->group_units) : 0;
  p->scale_bytes = scale_size(w.scale_kind);
  p->zero_bytes = w.zero == nullptr ? 0 : w.zero_kind == Zero::integer ? 1 : p->scale_bytes;
  p->scale_at = chunk * int(layout::unit_bytes(w.bits));
  p->zero_at = p->scale_at + groups * 64 * p->scale_bytes;
  p->block_at = p->zero_at + groups * 64 * p->zero_bytes;
  p->block_bytes = p->block_at + (scales && w.block_scale ? 256 : 0);
}

// Blocks that the device runs at a time.
int64_t resident_blocks(const Int8Launch& l, const DeviceLimits& limits) {
  constexpr int64_t reserved = 1024;        // bytes of shared memory per block
  constexpr int64_t threads = 65536 / 128;  // of at most 128 registers
  const int64_t by_memory = limits.shared_per_multiprocessor / (l.shared_bytes + reserved);
  const int64_t by_registers = threads / l.threads;
  const int64_t blocks = by_memory < by_registers ? by_memory : by_registers;
  return (blocks > 0 ? blocks : 1) * limits.multiprocessors;
}

// How many blocks share the columns of a tile: the fewest that keep 95% of the device busy in all
// waves, or the best there is.
int choose_splits(int64_t tiles, int64_t resident, int64_t most) {
  if (tiles > kLinearCounters || tiles >= 2 * resident) return 1;
  int best = 1;
  double best_busy = 0;
  for (int s = 1; s <= most && best_busy < 0.95; s++) {
    const double busy = double(tiles * s) / double(divide_up(tiles * s, resident) * resident);
    if (busy > best_busy) best = s, best_busy = busy;
  }
  return best;
}

// The columns in `parts`.
void deal_chunks(int chunk, int parts, Int8Plan* p) {
  const int chunks = int(divide_up(p->units, chunk));
  p->part_chunks = chunks / parts, p->long_parts = chunks % parts;
}

Int8Launch plan_decode(const LinearArgs& a, Int8Plan plan, const DeviceLimits& limits) {
  const int chunk = decode_chunk(a.w.bits), pitch = 16 * (chunk + 1);
  lay_out_block(a.w, chunk, true, &plan);
  plan.x_at = plan.block_bytes;
  plan.stage_bytes = plan.block_bytes + int(a.m) * pitch;
  plan.row_blocks = 1;
  plan.row_tiles = int(divide_up(a.w.n, 64)), plan.token_tiles = 1;
  Int8Launch l{};
  l.kernel = a.m <= 8 ? Int8Kernel::decode_8 : Int8Kernel::decode_16;
  int warps = kInt8Warps;
  for (;; warps /= 2) {
    const int64_t rings = int64_t(warps) * kDecodeStages * (plan.stage_bytes + 8);
    const int64_t sums = int64_t(warps) * a.m * 256 + 16;
    l.shared_bytes = rings > sums ? rings : sums;
    if (warps == 1 || l.shared_bytes <= limits.shared_per_block) break;
  }
  l.threads = 32 * warps;
  const int64_t chunks_of_warp = 2;  // so that a ring is worth filling
  plan.splits = choose_splits(plan.row_tiles, resident_blocks(l, limits),
                              divide_up(plan.units, chunk) / (warps * chunks_of_warp));
  deal_chunks(chunk, plan.splits * warps, &plan);
  l.grid = dim3(unsigned(plan.row_tiles), unsigned(plan.splits));
  l.plan = plan;
  return l;
}

// row_blocks: the most that a thread block takes; fewer where shared memory is short.
Int8Launch plan_tile(const LinearArgs& a, Int8Plan plan, const DeviceLimits& limits, bool rows,
                     int row_blocks) {
  const int tiles = rows ? 4 : 2;  // of 8 tokens, of a warp
  lay_out_block(a.w, kTileChunk, !rows, &plan);
  Int8Launch l{};
  l.kernel = rows ? Int8Kernel::tile_rows : Int8Kernel::tile;
  l.threads = kInt8Threads;
  int64_t tokens = 0;
  for (;; row_blocks /= 2) {
    tokens = kInt8Warps / row_blocks * 8 * tiles;
    plan.row_blocks = row_blocks;
    plan.x_at = row_blocks * plan.block_bytes;
    plan.stage_bytes = plan.x_at + int(tokens) * kTilePitch;
    l.shared_bytes = kTileStages * int64_t(plan.stage_bytes);
    if (row_blocks == 1 || l.shared_bytes <= limits.shared_per_block) break;
  }
  plan.row_tiles = int(divide_up(a.w.n, 64 * row_blocks));
  plan.token_tiles = int(divide_up(a.m, tokens));
  const int64_t chunks_of_block = 4;
  plan.splits =
      choose_splits(int64_t(plan.row_tiles) * plan.token_tiles, resident_blocks(l, limits),
                    divide_up(plan.units, kTileChunk) / chunks_of_block);
  deal_chunks(kTileChunk, plan.splits, &plan);
  l.grid = dim3(unsigned(plan.token_tiles), unsigned(plan.row_tiles), unsigned(plan.splits));
  l.plan = plan;
  return l;
}

Int8Launch plan_int8(const LinearArgs& a, const DeviceLimits& limits) {
  Int8Plan plan{};
  plan.units = int(divide_up(a.w.k, 16));
  plan.group_units = a.w.group / 16;
  plan.act_units = a.act.group / 16;
  plan.groups = int(a.w.kp / a.w.group);
  plan.act_groups = int(a.act.kx / a.act.group);
  const int64_t four = a.y_type == Dtype::f32 ? 16 : 8;
  const auto in_fours = [four](const void* p, int64_t stride) {
    return reinterpret_cast<uintptr_t>(p) % uintptr_t(four) == 0 && stride % 4 == 0;
  };
  plan.aligned_fours = a.w.n % 4 == 0 && in_fours(a.y, a.y_stride) &&
                       in_fours(a.residual, a.residual_stride) &&
                       reinterpret_cast<uintptr_t>(a.bias) % 16 == 0;
  plan.act_per_token = a.act.kx == a.act.group;
  if (a.m <= 16) return plan_decode(a, plan, limits);

  const bool symmetric_codes =
      a.w.zero_kind == Zero::symmetric && a.w.table == nullptr && a.w.block_scale == nullptr;
  const bool one_scale_per_row = a.w.kp == a.w.group && plan.act_per_token;
  const bool has_kernel = symmetric_codes && one_scale_per_row && (a.w.bits == 4 || a.w.bits == 8);
  if (has_kernel && a.m > 64) {
    const Int8Launch l = plan_tile(a, plan, limits, true, 2);
    if (l.plan.row_blocks == 2) return l;
  }
  const bool few_tokens = a.m <= 32;  // a tile of 256 rows wastes none of them
  return plan_tile(a, plan, limits, false, few_tokens ? 4 : 2);
}

int64_t partial_bytes(const LinearArgs& a, const Int8Launch& l) {
  if (l.plan.splits == 1) return 0;
  const bool decode = l.kernel == Int8Kernel::decode_8 || l.kernel == Int8Kernel::decode_16;
  const int64_t fours =
      decode ? a.m * 16 : kInt8Threads * 4 * (l.kernel == Int8Kernel::tile ? 2 : 4);
  return l.plan.splits * int64_t(l.plan.row_tiles) * l.plan.token_tiles * fours * 16;
}

}  // namespace

int64_t linear_int8_scratch(const LinearArgs& args, const DeviceLimits& limits) {
  return args.m == 0 ? 0 : partial_bytes(args, plan_int8(args, limits));
}

cudaError_t launch_linear_int8(const LinearArgs& args, void* scratch, uint32_t* counters,
                               cudaStream_t stream) {
  if (args.m == 0) return cudaSuccess;
  if (args.m > INT32_MAX - 1024) return cudaErrorInvalidValue;  // kernels count tokens in 32 bits
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
  Int8Launch l = plan_int8(args, limits);
  l.plan.partial = static_cast<float*>(scratch), l.plan.counters = counters;
  if (args.w.table) return launch_int8_table(l, args, stream);
  switch (args.w.bits) {
    case 2: return launch_int8_bits<2>(l, args, stream);
    case 3: return launch_int8_bits<3>(l, args, stream);
    case 4: return launch_int8_bits<4>(l, args, stream);
    case 5: return launch_int8_bits<5>(l, args, stream);
    case 6: return launch_int8_bits<6>(l, args, stream);
    case 8: return launch_int8_bits<8>(l, args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
