// Rows of a packed table as floats, times a multiplier: a thread per eight columns of a row. A row
// lies scattered over its units (4 of the 16 sectors of a unit of nibbles), so each is read by
// words.
#pragma once
#include "../args.h"
#include "decode.cuh"

namespace qk {

constexpr int kEmbeddingThreads = 256;

// `wide`: rows of y start on multiples of 16 bytes, and have whole octets. An id that is not a row
// of the table gives NaN.
template <class T>
__global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_kernel(const EmbeddingArgs args, const bool wide) {
  const Weight& w = args.w;
  const int64_t octets = (w.k + 7) / 8;
  const int64_t item = int64_t(blockIdx.x) * kEmbeddingThreads + threadIdx.x;
  const int64_t token = item / octets, col = (item - token * octets) * 8;
  if (token >= args.t) return;
  const int64_t row = args.ids[token];
  float v[8];
  if (row >= 0 && row < w.n) {
    const uint8_t* unit = w.codes + layout::unit_offset(row, col, w.kp, w.bits);
    const int t = int(col % layout::kUnitCols) / 4;
    uint32_t words[2];
    with_bits(w.bits, [&](auto bits) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        words[i] = load_word<decltype(bits)::value>(unit, int(row % layout::kUnitRows), t + i);
    });
    if (w.table) {
      const ByteTable table = load_byte_table(w.table);
#pragma unroll
      for (int i = 0; i < 2; i++) words[i] = table_bytes(table, words[i]);
    }
    const Decoding decoding = decoding_of(w, row, col / w.group);
    decode_octet(words, decoding, v);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= args.multiplier;
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = bits_float(0x7fc00000);
  }
  store_octet(static_cast<T*>(args.y) + token * w.k + col, v, wide, w.k - col);
}

inline cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream) {
  if (args.t == 0) return cudaSuccess;
  const bool wide = args.w.k % 8 == 0 && on_16_bytes(args.y);
  // 2^31 blocks of 2,048 values are more than any memory holds.
  const int64_t items = args.t * ((args.w.k + 7) / 8);
  const dim3 grid(unsigned((items + kEmbeddingThreads - 1) / kEmbeddingThreads));
  const auto typed = [&](auto zero) {
    return launch(embedding_kernel<decltype(zero)>, grid, dim3(kEmbeddingThreads), 0, stream, args,
                  wide);
  };
  switch (args.y_type) {
    case Dtype::f32: return typed(float{});
    case Dtype::f16: return typed(half_t{});
    case Dtype::bf16: return typed(bf16_t{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
