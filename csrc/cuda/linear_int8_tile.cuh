// More than 16 tokens: a block of 8 warps takes row_blocks blocks of 64 rows times tokens, its
// warps 64 rows times 8 kTiles tokens each, warps of the same rows side by side. Weights and
// activations come through shared memory by cp.async, three stages deep; every warp decodes its
// rows for itself.
#pragma once
#include "linear_int8.cuh"

namespace qk {

constexpr int kTileStages = 3, kTileChunk = 8, kTilePitch = 16 * (kTileChunk + 1);

// kRows: one scale per row and per token, no zeros; the sums stay integers over all of K.
template <class C, int kTiles, bool kRows>
__global__ void __launch_bounds__(kInt8Threads, 2)
    linear_int8_tile_kernel(const LinearArgs args, const Int8Plan p) {
  auto* shared = shared_memory<uint8_t>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int side = kInt8Warps / p.row_blocks;  // warps of the same rows
  const int own = warp / side;
  const int first_block = blockIdx.y * p.row_blocks, blocks = int((args.w.n + 63) / 64);
  const int tile_tokens = side * 8 * kTiles, own_token = warp % side * 8 * kTiles;
  const int first_token = blockIdx.x * tile_tokens;
  const int split = blockIdx.z;
  const int begin = p.first_chunk(split);
  const bool active = first_block + own < blocks;  // else it helps to copy

  const int end = p.first_chunk(split + 1);  // of the chunks
  const auto units_of = [&](int chunk) {
    const int left = p.units - chunk * kTileChunk;
    return left < kTileChunk ? left : kTileChunk;
  };
  const auto copy_stage = [&](int chunk) {
    if (chunk < end) {
      const int n = units_of(chunk), u0 = chunk * kTileChunk;
      uint8_t* stage = shared + chunk % kTileStages * p.stage_bytes;
#pragma unroll 1
      for (int r = 0; r < p.row_blocks && first_block + r < blocks; r++) {
        uint8_t* block = stage + r * p.block_bytes;
        weight_pieces<C, !kRows>(args.w, p, first_block + r, u0, n,
                                 [&](int at, const uint8_t* from, int size, bool codes) {
#pragma unroll 1
                                   for (int b = thread; b < size / 16; b += kInt8Threads) {
                                     int to = b;
                                     if constexpr (C::wide_bytes > 0) {
                                       const int in_unit = b % (C::unit_bytes / 16);
                                       if (codes && in_unit < C::wide_bytes / 16)
                                         to += swizzled_piece(in_unit) - in_unit;
                                     }
                                     copy_async<16>(block + at + 16 * to, from + 16 * b);
                                   }
                                 });
      }
#pragma unroll 1
      for (int b = thread; b < tile_tokens * kTileChunk; b += kInt8Threads) {
        const int token = b / kTileChunk, u = b % kTileChunk;
        if (u >= n) continue;
        const int64_t m = first_token + token;
        const int8_t* from = args.act.codes + m * args.act.kx + (u0 + u) * 16;
        // Of 0 bytes nothing is read, wherever they would lie.
        copy_async<16>(stage + p.x_at + token * kTilePitch + 16 * u, from, m < args.m ? 16 : 0);
      }
    }
    copy_commit();
  };

#pragma unroll
  for (int i = 0; i < kTileStages - 1; i++) copy_stage(begin + i);
  const Int8Table table = load_int8_table<C>(args.w);
  Int8Sums<C, kTiles> sums;
  sums.start();
  Cursor at(p, begin * kTileChunk);
  const int x_at = p.x_at + (own_token + x_row<kTiles>(lane)) * kTilePitch;
  for (int chunk = begin; chunk < end; chunk++) {
    copy_wait<kTileStages - 2>();
    block_sync();
    copy_stage(chunk + kTileStages - 1);
    if (!active) continue;
    const uint8_t* stage = shared + chunk % kTileStages * p.stage_bytes;
    const uint8_t* block = stage + own * p.block_bytes;
    const int n = units_of(chunk);
    if constexpr (kRows) {
#pragma unroll 1
      for (int u = 0; u < n; u += 2)
        sums.template add_units<true>(block + u * C::unit_bytes, stage + x_at + 16 * u, kTilePitch,
                                      u + 1 < n, table, lane);
    } else {
      add_chunk<C, kTiles, true>(args, p, block, stage + x_at, kTilePitch, n, chunk + 1 == end,
                                 first_token + own_token, lane, table, at, sums);
    }
  }

  const int tile = blockIdx.y * p.token_tiles + blockIdx.x;
  constexpr int kSize = kInt8Threads * 4 * kTiles;  // of a tile in `partial`, fours of rows
  const int64_t n0 = int64_t(first_block + own) * 64 + lane / 16 * 32 + lane / 4 % 4 * 4;
  const int m0 = first_token + own_token + 2 * (lane % 4);
  const auto for_each_four = [&](auto&& f) {  // f(index, token tile, j, h)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          if (active && m0 + 8 * n + j < args.m)
            f((4 * n + 2 * j + h) * kInt8Threads + thread, n, j, h);
  };
  for_each_four([&](int i, int n, int j, int h) {
    const int m = m0 + 8 * n + j;
    const int64_t row = n0 + 16 * h;
    const float factor = last_factor<C>(args, p, m);
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if constexpr (kRows)
        v[e] = float(sums.dot[n][e][2 * h + j]) *
               (flat_scale(args.w.scale_kind, args.w.scale, row + e) * factor);
      else v[e] = sums.y[n][e][2 * h + j] * factor;
    }
    if (p.splits == 1) write_four(args, p, m, row, v);
    else store_partial(p, split, tile, kSize, i, v);
  });
  if (p.splits == 1) return;
  // The flag lies where stages were read; a barrier comes before it.
  if (!last_to_arrive(p, tile, reinterpret_cast<uint32_t*>(shared))) return;
  for_each_four([&](int i, int n, int j, int h) {
    float v[4];
    sum_partials(p, tile, kSize, i, v);
    write_four(args, p, m0 + 8 * n + j, n0 + 16 * h, v);
  });
}

}  // namespace qk
