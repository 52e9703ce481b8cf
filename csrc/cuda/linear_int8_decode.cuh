// Up to 16 tokens: the weights' bandwidth is the bound.
//
// The warps of a block share 64 rows and split the columns, as the blocks of a tile do (splits).
// Every warp has a ring of stages of its own and waits for nobody but its copies: bulk copies, or
// cp.async before sm_90. Activations travel in the stages, so that any K fits.
#pragma once
#include "linear_int8.cuh"

namespace qk {

constexpr int kDecodeStages = 2;
// 4 KB of 4- and 8-bit codes in a stage.
constexpr int decode_chunk(int bits) { return bits > 4 ? 4 : 8; }

template <class C, int kTiles>
__global__ void __launch_bounds__(kInt8Threads, 2)
    linear_int8_decode_kernel(const LinearArgs args, const Int8Plan p) {
  constexpr int kChunk = decode_chunk(C::bits), kPitch = 16 * (kChunk + 1);
  auto* shared = shared_memory<uint8_t>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int tokens = int(args.m);
  const int row_block = blockIdx.x;
  const int part = blockIdx.y * warps + warp, begin = p.first_chunk(part);
  const int count = p.count_chunks(part);

  uint8_t* ring = shared + warp * kDecodeStages * p.stage_bytes;
  auto* arrived =  // [kDecodeStages] of each warp
      reinterpret_cast<uint64_t*>(shared + warps * kDecodeStages * p.stage_bytes) +
      warp * kDecodeStages;
  const bool bulk = bulk_copies();
  if (bulk) {
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kDecodeStages; i++) mbarrier_init(arrived + i);
      mbarrier_init_fence();
    }
    warp_sync();
  }
  const auto units_of = [&](int i) {
    const int left = p.units - (begin + i) * kChunk;
    return left < kChunk ? left : kChunk;
  };
  const auto copy_weights = [&](int i) {
    if (i >= count) return;
    const int n = units_of(i), u0 = (begin + i) * kChunk;
    uint8_t* stage = ring + i % kDecodeStages * p.stage_bytes;
    if (bulk) {
      if (lane != 0) return;
      uint64_t* barrier = arrived + i % kDecodeStages;
      int bytes = tokens * n * 16;
      weight_pieces<C, true>(args.w, p, row_block, u0, n,
                             [&](int, const uint8_t*, int size, bool) { bytes += size; });
      mbarrier_expect(barrier, uint32_t(bytes));
      weight_pieces<C, true>(args.w, p, row_block, u0, n,
                             [&](int at, const uint8_t* from, int size, bool) {
                               bulk_load(stage + at, from, uint32_t(size), barrier);
                             });
    } else {
      weight_pieces<C, true>(args.w, p, row_block, u0, n,
                             [&](int at, const uint8_t* from, int size, bool) {
#pragma unroll 1
                               for (int b = 16 * lane; b < size; b += 16 * 32)
                                 copy_async<16>(stage + at + b, from + b);
                             });
    }
  };
  const auto copy_x = [&](int i) {
    if (i < count) {
      const int n = units_of(i);
      uint8_t* to = ring + i % kDecodeStages * p.stage_bytes + p.x_at;
      const int8_t* from = args.act.codes + (begin + i) * kChunk * 16;
      if (bulk) {
        if (lane < tokens)
          bulk_load(to + lane * kPitch, from + lane * args.act.kx, uint32_t(n * 16),
                    arrived + i % kDecodeStages);
      } else {
#pragma unroll 1
        for (int b = lane; b < tokens * n; b += 32)
          copy_async<16>(to + b / n * kPitch + b % n * 16, from + b / n * args.act.kx + b % n * 16);
      }
    }
    if (!bulk) copy_commit();
  };

  if (!args.weights_settled) dependency_wait();
  for (int i = 0; i < kDecodeStages; i++) copy_weights(i);
  dependency_wait();
  for (int i = 0; i < kDecodeStages; i++) copy_x(i);

  const Int8Table table = load_int8_table<C>(args.w);
  Int8Sums<C, kTiles> sums;
  sums.start();
  Cursor at(p, begin * kChunk);
  const int row = x_row<kTiles>(lane);
  const int x_at = p.x_at + (row < tokens ? row : tokens - 1) * kPitch;
  for (int i = 0; i < count; i++) {
    if (bulk) {
      mbarrier_wait(arrived + i % kDecodeStages, i / kDecodeStages & 1);
    } else {
      copy_wait<kDecodeStages - 1>();
    }
    warp_sync();  // lanes leave either wait on their own
    const uint8_t* stage = ring + i % kDecodeStages * p.stage_bytes;
    add_chunk<C, kTiles, false>(args, p, stage, stage + x_at, kPitch, units_of(i), i + 1 == count,
                                0, lane, table, at, sums);
    warp_sync();
    copy_weights(i + kDecodeStages);
    copy_x(i + kDecodeStages);
  }
  dependency_launch();

  // The sums of the warps, then of the blocks, in order.
  auto* of_warps = reinterpret_cast<Words4*>(shared);  // [warps, tokens, 16] of four rows
  block_sync();
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int token = 8 * n + 2 * (lane % 4) + j;
      if (token >= tokens) continue;
      const float factor = last_factor<C>(args, p, token);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Words4 four;
#pragma unroll
        for (int e = 0; e < 4; e++)
          four.word[e] = uint32_t(float_bits(sums.y[n][e][2 * h + j] * factor));
        of_warps[(warp * tokens + token) * 16 + lane / 16 * 8 + 4 * h + lane / 4 % 4] = four;
      }
    }
  block_sync();
  const int size = tokens * 16, tile = blockIdx.x;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    float v[4] = {};
    for (int w = 0; w < warps; w++) {
      const Words4 four = of_warps[w * size + i];
#pragma unroll
      for (int e = 0; e < 4; e++) v[e] += bits_float(int32_t(four.word[e]));
    }
    if (p.splits == 1) write_four(args, p, i / 16, int64_t(row_block) * 64 + i % 16 * 4, v);
    else store_partial(p, blockIdx.y, tile, size, i, v);
  }
  if (p.splits == 1) return;
  auto* flag = reinterpret_cast<uint32_t*>(of_warps + warps * size);
  if (!last_to_arrive(p, tile, flag)) return;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    float v[4];
    sum_partials(p, tile, size, i, v);
    write_four(args, p, i / 16, int64_t(row_block) * 64 + i % 16 * 4, v);
  }
}

}  // namespace qk
