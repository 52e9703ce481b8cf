#include "decode.h"

namespace qk::QK_ISA {

void embedding(const EmbeddingArgs& a, Team& team) {
  const Weight& w = a.w;
  const int64_t chunks = (w.k + kChunkCols - 1) / kChunkCols;
  const Range share = team.share(a.t * chunks);
  with_type(a.y_type, [&](auto io) __attribute__((always_inline)) {
    using T = decltype(io);
    with_bits(w.bits, [&](auto bits) __attribute__((always_inline)) {
      for (int64_t item = share.begin; item < share.end; item++) {
        const int64_t token = item / chunks, begin = item % chunks * kChunkCols;
        const int64_t end = begin + kChunkCols < w.k ? begin + kChunkCols : w.k;
        dequantize_row<decltype(bits)::value, T>(
            w, a.ids[token], begin, end, a.multiplier,
            static_cast<typename T::type*>(a.y) + token * w.k + begin);
      }
    });
  });
}

}  // namespace qk::QK_ISA
