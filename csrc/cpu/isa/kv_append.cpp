// Rotary embedding of q and k, quantization of k and v, and their way into the pages: one pass over
// every new token.
//
// Integer pages hold x ~= scale * (code - zero) per token and head. The range always includes 0, so
// zero is a code; the scale is rounded up to fp16 before any code is computed, so that reading it
// back is what was quantized with, and the largest code is not clipped.
#include "simd.h"

namespace qk::QK_ISA {
namespace {

constexpr int kMaxDim = 512;  // the boundary refuses more

// x [D] <- rotated by the angles of one position; pairs (i, i + rotary_dim / 2).
QK_INLINE void rotate(float* x, const float* table, int rotary_dim) {
  const int half = rotary_dim / 2;
  const float *cos = table, *sin = table + half;
  int i = 0;
  for (; i + W <= half; i += W) {
    const VF a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, fma(a, c, -(b * s)));
    store(x + half + i, fma(b, c, a * s));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

struct Quantized {
  uint16_t scale, zero;  // fp16
};

// codes [D]: one per byte. A row with a NaN or an infinity gets a NaN scale, so that it reads back
// as NaN.
QK_INLINE Quantized quantize(const float* x, int64_t dim, int levels, uint8_t* codes) {
  typedef uint8_t VUB __attribute__((vector_size(W)));
  VF low{}, high{}, check{};
  for (int64_t d = 0; d < dim; d += W) {
    const VF v = load(x + d);
    low = vmin(v, low);
    high = vmax(v, high);
    check += v * splat(0.f);
  }
  for (int64_t d = 0; d < dim; d += W) store_raw(codes + d, VUB{});
  if (reduce_add(check) != 0.f) return {0x7e00, 0};
  const float lo = -reduce_max(-low), range = reduce_max(high) - lo;
  const float exact = range / float(levels);
  if (!(exact < 65504.f)) return {0x7e00, 0};
  uint16_t half = float_to_half(exact);
  if (half_to_float(half) < exact) half++;  // the next fp16 up
  const float scale = half_to_float(half);
  if (scale == 0.f) return {0, 0};
  const VI zero = round_int(splat(-lo / scale)), most = splat_i(levels), none{};
  for (int64_t d = 0; d < dim; d += W) {
    VI code = round_int(load(x + d) / splat(scale)) + zero;
    code = code < none ? none : code;
    code = code > most ? most : code;
    store_raw(codes + d, __builtin_convertvector(code, VUB));
  }
  return {half, float_to_half(float(zero[0]))};
}

QK_INLINE void pack_nibbles(const uint8_t* codes, int64_t dim, uint8_t* out) {
  for (int64_t c = 0; c < dim / 16; c++)
    for (int i = 0; i < 8; i++)
      out[8 * c + i] = uint8_t(codes[16 * c + i] | codes[16 * c + 8 + i] << 4);
}

template <class T>
QK_INLINE void read_row(const void* from, int64_t at, int64_t dim, float* x) {
  const auto* p = static_cast<const typename T::type*>(from) + at;
  for (int64_t d = 0; d < dim; d += W) store(x + d, T::load(p + d));
}
template <class T>
QK_INLINE void write_row(void* to, int64_t at, int64_t dim, const float* x) {
  auto* p = static_cast<typename T::type*>(to) + at;
  for (int64_t d = 0; d < dim; d += W) T::store(p + d, load(x + d));
}

// x [D] into one slot of a page. `pages` is [P, Hkv, page, D], `scales` [P, Hkv, 2, page].
QK_INLINE void put(const KvPages& p, void* pages, uint16_t* scales, int64_t page, int64_t head,
                   int64_t slot, const float* x) {
  const int64_t row = head * p.page + slot;
  uint8_t codes[kMaxDim];
  Quantized q{};
  switch (p.type) {
    case KvType::f32:
      return write_row<Io<Dtype::f32>>(pages, page * p.page_stride + row * p.dim, p.dim, x);
    case KvType::f16:
      return write_row<Io<Dtype::f16>>(pages, page * p.page_stride + row * p.dim, p.dim, x);
    case KvType::bf16:
      return write_row<Io<Dtype::bf16>>(pages, page * p.page_stride + row * p.dim, p.dim, x);
    case KvType::int8:
      q = quantize(x, p.dim, 255,
                   static_cast<uint8_t*>(pages) + page * p.page_stride + row * p.dim);
      break;
    case KvType::int4:
      q = quantize(x, p.dim, 15, codes);
      pack_nibbles(codes, p.dim,
                   static_cast<uint8_t*>(pages) + page * p.page_stride + row * (p.dim / 2));
      break;
  }
  uint16_t* scale = scales + page * p.scale_page_stride + head * 2 * p.page + slot;
  scale[0] = q.scale;
  scale[p.page] = q.zero;
}

// Units of work are (token, head): the heads of q, then those of k and v together.
template <class T>
void append(const KvAppendArgs& a, Team& team) {
  const int64_t heads = a.q_heads + a.pages.kv_heads, dim = a.pages.dim;
  const Range mine = team.share(a.batch.tokens * heads);
  alignas(64) float x[kMaxDim];
  int64_t b = 0;
  for (int64_t unit = mine.begin; unit < mine.end; unit++) {
    const int64_t token = unit / heads, head = unit % heads;
    while (token >= a.batch.query_start[b + 1]) b++;
    const int64_t index =
        a.batch.kv_len[b] - a.batch.query_start[b + 1] + token;  // its place in the sequence
    const float* angles =
        a.rope ? a.rope + (a.positions ? a.positions[token] : index) * a.rotary_dim : nullptr;
    if (head < a.q_heads) {
      read_row<T>(a.q, token * a.q_stride + head * dim, dim, x);
      if (angles) rotate(x, angles, a.rotary_dim);
      write_row<T>(a.q_out, (token * a.q_heads + head) * dim, dim, x);
      continue;
    }
    const int64_t kv_head = head - a.q_heads;
    const int64_t page = a.batch.page_table[b * a.batch.table_stride + index / a.pages.page],
                  slot = index % a.pages.page;
    read_row<T>(a.k, token * a.k_stride + kv_head * dim, dim, x);
    if (angles) rotate(x, angles, a.rotary_dim);
    put(a.pages, a.pages.k, a.pages.k_scale, page, kv_head, slot, x);
    read_row<T>(a.v, token * a.v_stride + kv_head * dim, dim, x);
    put(a.pages, a.pages.v, a.pages.v_scale, page, kv_head, slot, x);
  }
}

}  // namespace

void kv_append(const KvAppendArgs& a, Team& team) {
  with_type(a.type, [&](auto io) { append<decltype(io)>(a, team); });
}

}  // namespace qk::QK_ISA
