// Attention of many new tokens per sequence: products of matrices.
//
// A block takes kRows query rows (tokens times the heads of one KV head, so that any ratio of heads
// shares the keys), one KV head and all the keys that they see, kTile at a time; each warp has 8 kN
// rows. Keys and values are staged in two stages by cp.async and become fragments by ldmatrix.
// Rows of the tiles are 16 bytes longer than kDim elements: an odd number of 16-byte pieces, so
// that the eight rows of a matrix lie in different banks for every kDim, as an XOR swizzle does
// only for powers of two.
//
// Codes of int8 and int4 pages are staged as they are; every thread turns the pieces that it copied
// itself into the float16 tile, of which there is one.
#pragma once
#include "attention_warp.cuh"

namespace qk {

// kDim: the next multiple of 16 there is a kernel for. C: half_t or bf16_t.
template <class C, bool kCodes, int kDim>
struct PrefillShape {
  static constexpr int n = kDim <= 128 ? 2 : 1;  // beyond, sums of 16 rows take all registers
  static constexpr int warps = 8, threads = 32 * warps, rows = 8 * n * warps;
  static constexpr int tile = kDim <= 128 ? 64 : kDim == 256 ? 32 : 16;
  static constexpr int m = tile >= 32 ? 2 : 1;  // fragments of keys per softmax step
  static constexpr int pitch = kDim + 8;        // elements
  static constexpr int stages = kCodes ? 1 : 2;
  struct Codes {
    alignas(16) unsigned char k[tile][kDim / 16][16], v[tile][kDim / 16][16];  // int4: 8 of 16 used
    uint16_t scales[4][tile];  // k_scale, k_zero, v_scale, v_zero
  };
  struct Nothing {};
  struct Shared {
    QueryRows<rows> query;
    alignas(16) uint16_t q[rows][pitch];  // in the end, the output
    alignas(16) uint16_t k[stages][tile][pitch], v[stages][tile][pitch];
    Conditional<kCodes, Codes, Nothing> codes[2];
  };
};

// 16 codes, from int8 (16 bytes) or int4 (8 bytes), as float16 less their offset.
__device__ __forceinline__ void decode_piece(const unsigned char* from, bool nibbles,
                                             uint16_t* to /* [16] */) {
  Words4 out[2];
  if (nibbles) {
    const Words2 in = *reinterpret_cast<const Words2*>(from);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // bytes 2 i, 2 i + 1
      const uint32_t pair = select_bytes(in.word[i / 2], 0, i % 2 ? 0x4342 : 0x4140);
      out[0].word[i] = low_nibbles(pair), out[1].word[i] = high_nibbles(pair);
    }
  } else {
    const Words4 in = *reinterpret_cast<const Words4*>(from);
#pragma unroll
    for (int i = 0; i < 8; i++)
      out[i / 4].word[i % 4] = code_pair(in.word[i / 2], i % 2 ? 0x4342 : 0x4140);
  }
  reinterpret_cast<Words4*>(to)[0] = out[0];
  reinterpret_cast<Words4*>(to)[1] = out[1];
}

// Grid: [tiles of rows, KV heads]. Sequence b has the tiles from query_start[b] * group / kRows + b
// on: at least as many as it needs, found without a sum over the sequences before it.
template <class C, bool kCodes, int kDim>
__global__ void __launch_bounds__(PrefillShape<C, kCodes, kDim>::threads)
    attention_prefill_kernel(const AttentionTask task) {
  using Shape = PrefillShape<C, kCodes, kDim>;
  constexpr int kN = Shape::n, kM = Shape::m, kRows = Shape::rows, kTile = Shape::tile;
  constexpr int kTiles = kDim / 16, kThreads = Shape::threads;
  auto& shared = *shared_memory<typename Shape::Shared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.y;
  const bool nibbles = task.kv == KvType::int4;

  // The last tiles see most keys under a causal mask: they start first.
  const int64_t tile_index = int64_t(gridDim.x) - 1 - blockIdx.x;
  int b = 0, after = task.batch;
  auto first_tile = [&](int i) { return int64_t(task.query_start[i]) * task.group / kRows + i; };
  while (after - b > 1) {
    const int middle = (b + after) / 2;
    if (first_tile(middle) <= tile_index) b = middle;
    else after = middle;
  }
  const Sequence s = sequence_of(task, b);
  const int64_t first_row = (tile_index - first_tile(b)) * kRows;
  if (!takes(task, s) || first_row < 0 || first_row >= int64_t(s.count) * task.group) return;

  const int row0 = warp * 8 * kN;
  for (int r = row0; r < row0 + 8 * kN; r++)
    stage_row<C, kDim>(task, s, kv_head, first_row + r, shared.query, r,
                       [&](int dim, C element) { shared.q[r][dim] = to_bits(element); });
  block_sync();

  const int first = shared.query.first[0], begin = first - first % 16;
  const int end = shared.query.last[kRows - 1];
  const int my_first = shared.query.first[row0],
            all_see_from = shared.query.first[row0 + 8 * kN - 1];
  const int all_see_to = shared.query.last[row0], my_last = shared.query.last[row0 + 8 * kN - 1];

  auto fetch = [&](int key0, int stage) {
    constexpr int kPerPiece = kCodes ? 16 : 8, kPieces = kDim / kPerPiece;  // elements; of a row
    const int bytes = nibbles ? 8 : 16;
    for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces, key = key0 + row;
      const KeyRun run = key < end ? key_run(task, s, b, key / 16 * 16) : KeyRun{-1, 0};
      const bool valid = run.page >= 0 && piece * kPerPiece < task.dim;
      const int64_t at = piece * bytes;
      const uint8_t* k = k_rows(task, kv_head, run) + key % 16 * int64_t(task.k_row) + at;
      const uint8_t* v = v_rows(task, kv_head, run) + key % 16 * int64_t(task.v_row) + at;
      if constexpr (kCodes) {
        auto& codes = shared.codes[stage];
        if (nibbles) {
          copy_async<8>(codes.k[row][piece], k, valid ? 8 : 0);
          copy_async<8>(codes.v[row][piece], v, valid ? 8 : 0);
        } else {
          copy_async<16>(codes.k[row][piece], k, valid ? 16 : 0);
          copy_async<16>(codes.v[row][piece], v, valid ? 16 : 0);
        }
      } else {
        copy_async<16>(&shared.k[stage][row][8 * piece], k, valid ? 16 : 0);
        copy_async<16>(&shared.v[stage][row][8 * piece], v, valid ? 16 : 0);
      }
    }
    if constexpr (kCodes) {  // two keys of a plane each
      for (int i = threadIdx.x; i < 4 * kTile / 2; i += kThreads) {
        const int plane = i / (kTile / 2), row = i % (kTile / 2) * 2, key = key0 + row;
        const KeyRun run = key < end ? key_run(task, s, b, key / 16 * 16) : KeyRun{-1, 0};
        const uint16_t* from = (plane < 2 ? task.k_scale : task.v_scale) +
                               run.page * task.scale_page_stride +
                               (int64_t(kv_head) * 2 + plane % 2) * task.page + run.slot + key % 16;
        copy_async<4>(&shared.codes[stage].scales[plane][row], from,
                      run.page < 0    ? 0
                      : key + 1 < end ? 4
                                      : 2);
      }
    }
    copy_commit();
  };

  const Factors<kN> factors(shared.query, row0);
  Softmax<kN> softmax;
  float acc[kTiles][kN][4] = {};
  int stage = 0;
  if (begin < end) fetch(begin, 0);
  for (int key0 = begin; key0 < end; key0 += kTile, stage ^= 1) {
    copy_wait<0>();
    block_sync();  // the tile is there, and the one before it has been read
    if (key0 + kTile < end) fetch(key0 + kTile, stage ^ 1);
    if constexpr (kCodes) {
      auto& codes = shared.codes[stage];
      for (int i = threadIdx.x; i < kTile * kTiles; i += kThreads) {  // as they were copied
        const int row = i / kTiles, piece = i % kTiles;
        decode_piece(codes.k[row][piece], nibbles, &shared.k[0][row][16 * piece]);
        decode_piece(codes.v[row][piece], nibbles, &shared.v[0][row][16 * piece]);
      }
      block_sync();
    }
    const auto& k = shared.k[kCodes ? 0 : stage];
    const auto& v = shared.v[kCodes ? 0 : stage];
    uint32_t absent = 0;  // bit i: keys 16 i to 16 i + 15 of the tile are not there
    if (task.page_table) {
      const int key = key0 + 16 * lane;
      absent = ballot(lane < kTile / 16 && key < end && key_run(task, s, b, key).page < 0);
    }
#pragma unroll 1
    for (int part = 0; part < kTile; part += 16 * kM) {
      const int key = key0 + part;
      if (key >= my_last || key + 16 * kM <= my_first) continue;
      float score[kM][kN][4] = {};
      constexpr int kQuerySteps = kN == 2 ? 1 : 2;  // k-steps that one load of q serves
#pragma unroll
      for (int step = 0; step < kTiles; step += kQuerySteps) {
        uint32_t q[4];
        if constexpr (kN == 2)
          load_matrices(q,
                        &shared.q[row0 + lane / 16 * 8 + lane % 8][16 * step + lane / 8 % 2 * 8]);
        else load_matrices(q, &shared.q[row0 + lane % 8][16 * step + lane / 8 * 8]);
#pragma unroll
        for (int u = 0; u < kQuerySteps; u++)
#pragma unroll
          for (int m = 0; m < kM; m++) {
            uint32_t a[4];
            load_matrices(
                a,
                &k[part + 16 * m + lane / 8 % 2 * 8 + lane % 8][16 * (step + u) + lane / 16 * 8]);
#pragma unroll
            for (int n = 0; n < kN; n++)
              mma_16816<C>(score[m][n], a, q[2 * (n + u)], q[2 * (n + u) + 1]);
          }
      }
      KeyScales<kM> scales;
      if constexpr (kCodes)
        load_scales(&shared.codes[stage].scales[0][part], kTile, nibbles ? 8.f : 128.f, scales);
      uint32_t weights[kM][kN][2];
      const uint32_t not_there = absent >> part / 16;
      const bool masked = key < all_see_from || key + 16 * kM > all_see_to || not_there != 0;
      weigh<C, kM, kN, kCodes>(task, shared.query, row0, s.length - s.count, key, masked, not_there,
                               score, factors, scales, softmax, acc, weights);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
          uint32_t a[4];
          load_matrices<true>(
              a, &v[part + 16 * m + lane / 16 * 8 + lane % 8][16 * j + lane / 8 % 2 * 8]);
#pragma unroll
          for (int n = 0; n < kN; n++)
            mma_16816<C>(acc[j][n], a, weights[m][n][0], weights[m][n][1]);
        }
    }
  }

  // Out by way of this warp's rows of q, which only it has read.
  warp_sync();
#pragma unroll
  for (int n = 0; n < kN; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int r = row0 + 8 * n + 2 * t + c;
      const float sink = sink_score(task, shared.query.head[r]);
      const float reference = softmax.reference[n][c], most = larger(sink, reference);
      const float times_sum = exp2_approx(reference - most);
      const float l = over_keys_sum(softmax.total[n][c]) * times_sum + exp2_approx(sink - most);
      const float zeros = kCodes ? over_keys_sum(softmax.zeros[n][c]) : 0.f;
      const float top = kCodes ? softmax.top : 1.f;
      const float times = l == 0.f ? 0.f : times_sum * top / l;
#pragma unroll
      for (int j = 0; j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          store_float(&shared.q[r][16 * j + 8 * i + g], task.type, 0,
                      (acc[j][n][2 * i + c] - zeros) * times);
    }
  warp_sync();
  for (int r = row0; r < row0 + 8 * kN; r++) {
    const int token = shared.query.token[r];
    if (token < 0) break;
    uint16_t* row = static_cast<uint16_t*>(task.out) +
                    ((s.first_token + token) * task.q_heads + shared.query.head[r]) * task.dim;
    for (int i = 8 * lane; i < task.dim; i += 8 * 32)
      store_128(row + i, *reinterpret_cast<const Words4*>(&shared.q[r][i]));
  }
}

template <class C, bool kCodes, int kDim>
cudaError_t launch_attention_prefill_shape(const AttentionTask& task, cudaStream_t stream) {
  using Shape = PrefillShape<C, kCodes, kDim>;
  const int64_t tiles = task.tokens * task.group / Shape::rows + task.batch;
  if (tiles > INT32_MAX || task.kv_heads > 65535) return cudaErrorInvalidValue;
  return launch(attention_prefill_kernel<C, kCodes, kDim>,
                dim3(unsigned(tiles), unsigned(task.kv_heads)), dim3(Shape::threads),
                sizeof(typename Shape::Shared), stream, task);
}
template <class C, bool kCodes>
cudaError_t launch_attention_prefill_pages(const AttentionTask& task, cudaStream_t stream) {
  if (task.dim <= 64) return launch_attention_prefill_shape<C, kCodes, 64>(task, stream);
  if constexpr (!kCodes) {  // codes make their tile from fewer bytes: 128 serves these too
    if (task.dim <= 80) return launch_attention_prefill_shape<C, kCodes, 80>(task, stream);
    if (task.dim <= 96) return launch_attention_prefill_shape<C, kCodes, 96>(task, stream);
  }
  if (task.dim <= 128) return launch_attention_prefill_shape<C, kCodes, 128>(task, stream);
  if (task.dim <= 256) return launch_attention_prefill_shape<C, kCodes, 256>(task, stream);
  return launch_attention_prefill_shape<C, kCodes, 512>(task, stream);
}

// One translation unit each: attention_prefill_{f16,bf16,codes}.cu.
cudaError_t launch_attention_prefill_f16(const AttentionTask&, cudaStream_t);
cudaError_t launch_attention_prefill_bf16(const AttentionTask&, cudaStream_t);
cudaError_t launch_attention_prefill_codes(const AttentionTask&, cudaStream_t);

}  // namespace qk
