// Attention of few new tokens per sequence: the time is that of reading the keys and values once.
//
// A block takes 8 kN query rows (the heads of one KV head times the new tokens), one KV head and
// one split of the keys they see; its warps take 16 keys in turn. Each lane copies into shared
// memory the very bytes that it will read as its fragments, so that a ring of copies needs no
// barrier and no swizzle:
//
//   K: lane (g, t) has keys g and g + 8, pieces p * 4 + t of kPiece bytes of their rows
//   V: lane (g, t) has keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9, pieces p * 8 + g of kValuePiece bytes
//
// Which dims of the product a fragment stands for is free as long as q's fragments agree (K) or the
// result is stored accordingly (V), hence whole pieces in one lane: decode_dim and value_dim.
//
// Splits: their number is fixed on the host from bounds; every sequence is cut into that many equal
// parts of what it has. With more than one, partial sums go to scratch and attention_merge_kernel
// adds them in order: one more launch, which overlaps its predecessor's end, instead of counters
// that would have to stay zero between launches.
#pragma once
#include "attention_warp.cuh"

namespace qk {

// Of all splits: [splits, T, Hq] reference and total, [splits, T, Hq, D] sums of weight * value.
struct AttentionParts {
  float* reference;
  float* total;
  float* sum;
};
// Sequences of more new tokens are left to the prefill kernel, if that is launched.
constexpr int kDecodeTokens = 8;
// 16-bit types with kDim dims (the next of 64, 128, 256, 512; what is beyond D is zero).
template <KvType kKv, int kDim, int kN>
struct DecodeShape {
  static constexpr int bits = kKv == KvType::int8 ? 8 : kKv == KvType::int4 ? 4 : 16;
  static constexpr bool codes = bits < 16;
  static constexpr int rows = 8 * kN;
  // Rows of int4 pages are multiples of 8 bytes and no more.
  static constexpr int piece = bits == 4 ? 8 : 16;
  static constexpr int pieces = kDim * bits / 8 / 4 / piece;
  static constexpr int value_bytes = kDim * bits / 8 / 8;  // of a lane
  static constexpr int value_piece = value_bytes < piece ? value_bytes : piece;
  static constexpr int value_pieces = value_bytes / value_piece;
  // Of a stage of one warp, in bytes: K, V, [k_scale, k_zero, v_scale, v_zero][16] fp16.
  static constexpr int values = 16 * kDim * bits / 8, scales = 2 * values;
  static constexpr int stage = scales + (codes ? 4 * 16 * 2 : 0);
  // A multiprocessor needs about 40 KB on their way; 16 KB per warp with three blocks of four
  // warps are more, and fit 227 KB.
  static constexpr int wanted = (16 << 10) / stage;
  static constexpr int stages = wanted < 2 ? 2 : wanted > 6 ? 6 : wanted;
  static constexpr int warps = stage > 16 << 10 ? 2 : 4;
  // On a multiprocessor; what hides latency is on its way to the ring, so registers (168 of a
  // thread for three blocks) go to the sums.
  static constexpr int blocks = kDim * kN <= 128 ? 3 : kDim <= 128 ? 2 : 1;
  static constexpr int ring = stages * stage * warps;
  static constexpr int merge = warps * rows * (kDim + 2) * 4;
  struct Shared {
    QueryRows<rows> query;
    uint16_t q[kN][kDim / 16][32][4];  // as B fragments
    alignas(16) unsigned char bytes[ring > merge ? ring : merge];
  };
};

// The words of a piece.
template <int kBytes>
struct Piece {
  uint32_t word[kBytes / 4];
};
template <int kBytes>
__device__ __forceinline__ Piece<kBytes> load_piece(const unsigned char* p) {
  Piece<kBytes> r;
  if constexpr (kBytes == 16) {
    const Words4 v = *reinterpret_cast<const Words4*>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) r.word[i] = v.word[i];
  } else if constexpr (kBytes == 8) {
    const Words2 v = *reinterpret_cast<const Words2*>(p);
    r.word[0] = v.word[0], r.word[1] = v.word[1];
  } else {
    r.word[0] = *reinterpret_cast<const uint32_t*>(p);
  }
  return r;
}

// Where dim d of q goes: half `half` of b[`index`] of lane t in k-step `step`.
struct FragmentPlace {
  int step, t, index, half;
};
template <KvType kKv>
__device__ __forceinline__ FragmentPlace decode_dim(int d) {
  if constexpr (kKv == KvType::int4) {
    // Piece: 16 dims, the low nibbles of word w in steps 2 w, the high ones in 2 w + 1; bytes 0 and
    // 2 are b[0], 1 and 3 b[1].
    return {d / 64 * 4 + d / 4 % 2 * 2 + d / 8 % 2, d / 16 % 4, d % 2, d / 2 % 2};
  } else if constexpr (kKv == KvType::int8) {
    return {d / 64 * 4 + d / 4 % 4, d / 16 % 4, d / 2 % 2, d % 2};  // piece: 16 dims
  } else {
    return {d / 32 * 2 + d / 4 % 2, d / 8 % 4, d / 2 % 2, d % 2};  // piece: 8 dims
  }
}
// The first of the two dims of fragment rows g and g + 8 of tile `tile` (of kDim / 16).
template <class Shape, KvType kKv>
__device__ __forceinline__ int value_dim(int tile, int g) {
  constexpr int per_piece = Shape::value_piece * 8 / Shape::bits / 2;  // tiles
  const int offset = (tile / per_piece * 8 + g) * Shape::value_piece, u = tile % per_piece;
  if constexpr (kKv == KvType::int4) {
    const int at = offset + u / 4 * 4;  // of the word; then half u / 2 % 2 of it, nibbles u % 2
    return at / 8 * 16 + at % 8 + u / 2 % 2 * 2 + u % 2 * 8;
  } else {
    return offset * 8 / Shape::bits + 2 * u;
  }
}

// The A fragment of K in k-step `step` of a piece, of keys g (low) and g + 8 (high).
template <KvType kKv, int kBytes>
__device__ __forceinline__ void key_fragment(const Piece<kBytes>& low, const Piece<kBytes>& high,
                                             int step, uint32_t (&a)[4]) {
  if constexpr (kKv == KvType::int4) {
    const uint32_t x = low.word[step / 2], y = high.word[step / 2];
    if (step % 2 == 0) {
      a[0] = low_nibbles(x), a[1] = low_nibbles(y);
      a[2] = low_nibbles(x >> 8), a[3] = low_nibbles(y >> 8);
    } else {
      a[0] = high_nibbles(x), a[1] = high_nibbles(y);
      a[2] = high_nibbles(x >> 8), a[3] = high_nibbles(y >> 8);
    }
  } else if constexpr (kKv == KvType::int8) {
    a[0] = code_pair(low.word[step], 0x4140), a[1] = code_pair(high.word[step], 0x4140);
    a[2] = code_pair(low.word[step], 0x4342), a[3] = code_pair(high.word[step], 0x4342);
  } else {
    a[0] = low.word[2 * step], a[1] = high.word[2 * step];
    a[2] = low.word[2 * step + 1], a[3] = high.word[2 * step + 1];
  }
}
// The A fragment of V^T in tile `u` of a piece, of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
template <KvType kKv, int kBytes>
__device__ __forceinline__ void value_fragment(const Piece<kBytes> (&key)[4], int u,
                                               uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const Piece<kBytes>&x = key[2 * i], &y = key[2 * i + 1];
    if constexpr (kKv == KvType::int4) {
      // Bytes x y of keys: [x0, x1, y0, y1] or [x2, x3, y2, y3]
      const int w = u / 4;
      const uint32_t both = select_bytes(x.word[w], y.word[w], u / 2 % 2 ? 0x7632 : 0x5410);
      a[2 * i] = u % 2 ? high_nibbles(both) : low_nibbles(both);
      a[2 * i + 1] = u % 2 ? high_nibbles(both >> 8) : low_nibbles(both >> 8);
    } else if constexpr (kKv == KvType::int8) {
      // [x0, y0, x1, y1] or [x2, y2, x3, y3]
      const int w = u / 2;
      const uint32_t both = select_bytes(x.word[w], y.word[w], u % 2 ? 0x7362 : 0x5140);
      a[2 * i] = code_pair(both, 0x4140), a[2 * i + 1] = code_pair(both, 0x4342);
    } else {
      a[2 * i] = select_bytes(x.word[u], y.word[u], 0x5410);
      a[2 * i + 1] = select_bytes(x.word[u], y.word[u], 0x7632);
    }
  }
}

// Grid: splits * row_tiles * KV heads * sequences blocks, splits innermost. A block takes the row
// tiles j, j + row_tiles, ... of its sequence, which are one unless tokens crowd in few sequences.
template <KvType kKv, int kDim, int kN>
__global__ void __launch_bounds__(DecodeShape<kKv, kDim, kN>::warps * 32,
                                  DecodeShape<kKv, kDim, kN>::blocks)
    attention_decode_kernel(const AttentionTask task, const AttentionParts parts, int splits,
                            int row_tiles) {
  using Shape = DecodeShape<kKv, kDim, kN>;
  using C = ProductType<kKv>;
  constexpr int kRows = Shape::rows, kWarps = Shape::warps, kTiles = kDim / 16;
  constexpr float kOffset = kKv == KvType::int4 ? 8.f : 128.f;
  auto& shared = *shared_memory<typename Shape::Shared>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int64_t block = blockIdx.x;
  const int split = int(block % splits);
  block /= splits;
  const int first_tile = int(block % row_tiles);
  block /= row_tiles;
  const int kv_head = int(block % task.kv_heads), b = int(block / task.kv_heads);

  dependency_launch();
  dependency_wait();
  const Sequence s = sequence_of(task, b);
  if (!takes(task, s)) return;
  const int64_t row_count = int64_t(s.count) * task.group;
  const int row_bytes = task.dim * Shape::bits / 8;
  // Of this lane's first pieces in page 0, slot 0; its plane of scales: lane / 8, of whose 16 keys
  // it copies 2 (lane % 8) and the next.
  const uint8_t* const my_k =
      task.k + kv_head * task.head_stride + g * task.k_row + t * Shape::piece;
  const uint8_t* const my_v =
      task.v + kv_head * task.head_stride + 2 * t * task.v_row + g * Shape::value_piece;
  const uint16_t* const my_plane =
      (lane < 16 ? task.k_scale : task.v_scale) + (int64_t(kv_head) * 2 + lane / 8 % 2) * task.page;
  unsigned char* const ring = shared.bytes + warp * Shape::stages * Shape::stage;

  for (int64_t tile = first_tile; tile * kRows < row_count; tile += row_tiles) {
    if (tile != first_tile) block_sync();  // the sums of the tile before have been read

    // This split's share of the keys that any row sees, in whole steps of all warps.
    const int64_t position0 = s.length - s.count;
    const Seen low = seen_keys(task, s, position0 + tile * kRows / task.group);
    const int64_t last_row = smaller(tile * kRows + kRows, row_count) - 1;
    const Seen high = seen_keys(task, s, position0 + last_row / task.group);
    const int seen_first = low.first - low.first % 16, seen_last = high.last;
    const int steps_seen = (seen_last - seen_first + 15) / 16;  // <= 0: no key, no step below
    const int share = (steps_seen + splits * kWarps - 1) / (splits * kWarps) * kWarps;
    const int begin = seen_first + 16 * smaller(split * share, steps_seen);
    const int steps_left = smaller(share, steps_seen - smaller(split * share, steps_seen)) - warp;
    const int steps = (steps_left + kWarps - 1) / kWarps;  // of this warp; <= 0: none
    auto key_of = [&](int step) { return begin + 16 * (warp + step * kWarps); };

    // Lane l looks up the page of step i + l, for 32 steps at once and 32 steps ahead.
    KeyRun mine{}, ahead{};
    if (lane < steps) ahead = key_run(task, s, b, key_of(lane));
    uint32_t absent = 0;  // by slot of the ring: the page is out of range
    int fetched = 0, fetch_slot = 0;
    auto fetch = [&] {
      if (fetched < steps) {
        if (fetched % 32 == 0) {
          mine = ahead;
          if (fetched + 32 + lane < steps) ahead = key_run(task, s, b, key_of(fetched + 32 + lane));
        }
        const KeyRun run{shuffle(mine.page, fetched % 32), shuffle(mine.slot, fetched % 32)};
        absent = run.page < 0 ? absent | 1u << fetch_slot : absent & ~(1u << fetch_slot);
        if (run.page >= 0) {
          const int there = seen_last - key_of(fetched);  // rows of this step
          unsigned char* const to = ring + fetch_slot * Shape::stage;
          const uint8_t* const k =
              my_k + run.page * task.page_stride + run.slot * int64_t(task.k_row);
          const uint8_t* const v =
              my_v + run.page * task.page_stride + run.slot * int64_t(task.v_row);
          auto copy = [&](auto valid_bytes) {  // (row, byte in the row, of how many)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
              for (int p = 0; p < Shape::pieces; p++)
                copy_async<Shape::piece>(
                    to + ((i * Shape::pieces + p) * 32 + lane) * Shape::piece,
                    k + i * 8 * task.k_row + p * 4 * Shape::piece,
                    valid_bytes(g + 8 * i, (p * 4 + t) * Shape::piece, Shape::piece));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
              for (int p = 0; p < Shape::value_pieces; p++)
                copy_async<Shape::value_piece>(
                    to + Shape::values +
                        ((i * Shape::value_pieces + p) * 32 + lane) * Shape::value_piece,
                    v + (i % 2 + i / 2 * 8) * task.v_row + p * 8 * Shape::value_piece,
                    valid_bytes(2 * t + i % 2 + i / 2 * 8, (p * 8 + g) * Shape::value_piece,
                                Shape::value_piece));
          };
          // Nearly every step is whole; predicates would be a third of the loop's instructions.
          const bool whole = there >= 16 && row_bytes == kDim * Shape::bits / 8;
          if (whole) {
            copy([](int, int, int bytes) { return bytes; });
          } else {
            copy([&](int row, int at, int bytes) {
              return row < there && at < row_bytes ? bytes : 0;
            });
          }
          if constexpr (Shape::codes) {
            const uint16_t* plane = my_plane + run.page * task.scale_page_stride + run.slot;
            const int row = 2 * (lane % 8), valid = there - row;
            copy_async<4>(to + Shape::scales + lane * 4, plane + row,
                          valid >= 2   ? 4
                          : valid == 1 ? 2
                                       : 0);
          }
        }
      }
      copy_commit();
      fetched++;
      fetch_slot = fetch_slot + 1 == Shape::stages ? 0 : fetch_slot + 1;
    };
    // Keys are on their way before the queries are looked at.
    for (int i = 0; i < Shape::stages - 1; i++) fetch();

    for (int r = warp; r < kRows; r += kWarps)
      stage_row<C, kDim>(
          task, s, kv_head, tile * kRows + r, shared.query, r, [&](int dim, C element) {
            const FragmentPlace at = decode_dim<kKv>(dim);
            shared.q[r / 8][at.step][r % 8 * 4 + at.t][2 * at.index + at.half] = to_bits(element);
          });
    block_sync();

    const Factors<kN> factors(shared.query, 0);
    Softmax<kN> softmax;
    float acc[kTiles][kN][4] = {};

    int slot = 0;
    for (int step = 0; step < steps; step++, slot = slot + 1 == Shape::stages ? 0 : slot + 1) {
      copy_wait<Shape::stages - 2>();
      if constexpr (Shape::codes) warp_sync();  // scales come from other lanes' copies
      const bool there = !(absent >> slot & 1);
      fetch();
      if (!there) continue;
      const int key = key_of(step);
      const unsigned char* from = ring + slot * Shape::stage + lane * Shape::piece;

      float score[1][kN][4] = {};
#pragma unroll
      for (int p = 0; p < Shape::pieces; p++) {
        Piece<Shape::piece> k[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
          k[i] = load_piece<Shape::piece>(from + (i * Shape::pieces + p) * 32 * Shape::piece);
        constexpr int kSteps = kTiles / Shape::pieces;
#pragma unroll
        for (int u = 0; u < kSteps; u++) {
          uint32_t a[4];
          key_fragment<kKv>(k[0], k[1], u, a);
#pragma unroll
          for (int n = 0; n < kN; n++) {
            // From shared memory: 16 registers are worth more than half a load per key.
            const Words2 q = *reinterpret_cast<const Words2*>(shared.q[n][p * kSteps + u][lane]);
            mma_16816<C>(score[0][n], a, q.word[0], q.word[1]);
          }
        }
      }

      KeyScales<1> scales;
      if constexpr (Shape::codes)
        load_scales(reinterpret_cast<const uint16_t*>(ring + slot * Shape::stage + Shape::scales),
                    16, kOffset, scales);
      uint32_t weights[1][kN][2];
      const bool masked = key < high.first || key + 16 > low.last;
      weigh<C, 1, kN, Shape::codes>(task, shared.query, 0, position0, key, masked, 0, score,
                                    factors, scales, softmax, acc, weights);
      from = ring + slot * Shape::stage + Shape::values + lane * Shape::value_piece;
#pragma unroll
      for (int p = 0; p < Shape::value_pieces; p++) {
        Piece<Shape::value_piece> v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          v[i] = load_piece<Shape::value_piece>(from + (i * Shape::value_pieces + p) * 32 *
                                                           Shape::value_piece);
        constexpr int kPer = kTiles / Shape::value_pieces;
#pragma unroll
        for (int u = 0; u < kPer; u++) {
          uint32_t a[4];
          value_fragment<kKv>(v, u, a);
#pragma unroll
          for (int n = 0; n < kN; n++)
            mma_16816<C>(acc[p * kPer + u][n], a, weights[0][n][0], weights[0][n][1]);
        }
      }
    }

    // The warps' sums, in their order.
    block_sync();                                              // the ring has been read
    auto* reference = reinterpret_cast<float*>(shared.bytes);  // [kWarps][kRows]
    float* total = reference + kWarps * kRows;                 // [kWarps][kRows]
    float* sums = total + kWarps * kRows;                      // [kWarps][kRows][kDim]
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int r = 8 * n + 2 * t + c;
        const float l = over_keys_sum(softmax.total[n][c]);
        if (g == 0) {
          reference[warp * kRows + r] = softmax.reference[n][c];
          total[warp * kRows + r] = l;
        }
        const float zeros = Shape::codes ? over_keys_sum(softmax.zeros[n][c]) : 0.f;
        const float top = Shape::codes ? softmax.top : 1.f;
        float* row = sums + (warp * kRows + r) * kDim;
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
          const int dim = value_dim<Shape, kKv>(j, g);
          row[dim] = (acc[j][n][c] - zeros) * top;
          row[dim + 1] = (acc[j][n][c + 2] - zeros) * top;
        }
      }
    block_sync();
    for (int r = warp; r < kRows; r += kWarps) {
      const int token = shared.query.token[r], head = shared.query.head[r];
      if (token < 0) break;
      const int64_t at = (s.first_token + token) * task.q_heads + head;
      float most = splits == 1 ? larger(sink_score(task, head), kLowest) : kLowest;
      for (int w = 0; w < kWarps; w++) most = larger(reference[w * kRows + r], most);
      float share_of[kWarps], l = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        share_of[w] = exp2_approx(reference[w * kRows + r] - most);
        l += total[w * kRows + r] * share_of[w];
      }
      float times = 1.f;
      if (splits == 1) {
        l += exp2_approx(sink_score(task, head) - most);
        times = l == 0.f ? 0.f : 1.f / l;
      } else if (lane == 0) {
        parts.reference[split * task.tokens * task.q_heads + at] = most;
        parts.total[split * task.tokens * task.q_heads + at] = l;
      }
      for (int dim = lane; dim < task.dim; dim += 32) {
        float v = 0;
#pragma unroll
        for (int w = 0; w < kWarps; w++) v += sums[(w * kRows + r) * kDim + dim] * share_of[w];
        if (splits == 1) store_float(task.out, task.type, at * task.dim + dim, v * times);
        else parts.sum[(split * task.tokens * task.q_heads + at) * task.dim + dim] = v;
      }
    }
  }
}

// What a decode launch looks like.
struct DecodePlan {
  int dim, rows_of_8;  // kDim and kN
  int splits, row_tiles;
  int64_t scratch;  // bytes
};
template <KvType kKv, int kDim, int kN>
cudaError_t launch_attention_decode_shape(const AttentionTask& task, const AttentionParts& parts,
                                          const DecodePlan& plan, cudaStream_t stream) {
  using Shape = DecodeShape<kKv, kDim, kN>;
  const int64_t blocks = int64_t(plan.splits) * plan.row_tiles * task.kv_heads * task.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(attention_decode_kernel<kKv, kDim, kN>, dim3(unsigned(blocks)),
                          dim3(Shape::warps * 32), sizeof(typename Shape::Shared), stream, task,
                          parts, plan.splits, plan.row_tiles);
}
template <KvType kKv>
cudaError_t launch_attention_decode_pages(const AttentionTask& task, const AttentionParts& parts,
                                          const DecodePlan& plan, cudaStream_t stream) {
  if (plan.dim == 64 && plan.rows_of_8 == 1)
    return launch_attention_decode_shape<kKv, 64, 1>(task, parts, plan, stream);
  if (plan.dim == 64) return launch_attention_decode_shape<kKv, 64, 2>(task, parts, plan, stream);
  if (plan.dim == 128 && plan.rows_of_8 == 1)
    return launch_attention_decode_shape<kKv, 128, 1>(task, parts, plan, stream);
  if (plan.dim == 128) return launch_attention_decode_shape<kKv, 128, 2>(task, parts, plan, stream);
  if (plan.dim == 256) return launch_attention_decode_shape<kKv, 256, 1>(task, parts, plan, stream);
  return launch_attention_decode_shape<kKv, 512, 1>(task, parts, plan, stream);
}

// One translation unit each: attention_decode_{f16,bf16,int8,int4}.cu.
cudaError_t launch_attention_decode_f16(const AttentionTask&, const AttentionParts&,
                                        const DecodePlan&, cudaStream_t);
cudaError_t launch_attention_decode_bf16(const AttentionTask&, const AttentionParts&,
                                         const DecodePlan&, cudaStream_t);
cudaError_t launch_attention_decode_int8(const AttentionTask&, const AttentionParts&,
                                         const DecodePlan&, cudaStream_t);
cudaError_t launch_attention_decode_int4(const AttentionTask&, const AttentionParts&,
                                         const DecodePlan&, cudaStream_t);

}  // namespace qk
