// pack, unpack and dequantize, but for who computes: codes and floats to and from the packed layout
// (layout.h). They check, allocate and run; a weight always has rows and columns.
#pragma once
#include "check.h"

namespace qk {

// Finds memory for args.seen, and returns what it holds once all is packed.
using PackRun = uint32_t (*)(const char* op, const Tensor& codes, PackArgs&);
using UnpackRun = void (*)(const char* op, const Tensor& codes, const UnpackArgs&);

// codes [N, K] uint8 -> [Np, Kp * bits / 8] int8
template <PackRun kRun>
Tensor pack(const Tensor& codes, int64_t bits, int64_t group, bool two_level) {
  constexpr const char* op = "pack";
  expect(op, "codes", codes, ScalarType::Byte, {-1, -1});
  const int64_t n = codes.size(0), k = codes.size(1);
  check(bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8, op,
        "bits must be 2, 3, 4, 5, 6 or 8, got ", bits);
  check_sizes(op, n, k);
  check_group(op, "group_size", group);
  check(!two_level || layout::kBlockGroup % group == 0, op,
        "two-level scales need a group_size that divides 256, got ", group);
  const int64_t kp = layout::padded_k(k, group, two_level), np = layout::padded_n(n);
  Tensor out = empty_on(codes, {np, kp * bits / 8}, ScalarType::Char);
  PackArgs args{data<uint8_t>(codes), mutable_data<uint8_t>(out), n, k, kp, int(bits), nullptr};
  const uint32_t seen = kRun(op, codes, args);
  const uint32_t used = (seen | seen >> 8 | seen >> 16 | seen >> 24) & 0xff;
  check(used >> bits == 0, op, "codes must be below 2^bits = ", 1 << bits,
        ", but some have higher bits set");
  return out;
}

// -> [N, K] uint8
template <UnpackRun kRun>
Tensor unpack(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
              const std::optional<Tensor>& block_scale, const std::optional<Tensor>& block_zero,
              const std::optional<Tensor>& table, int64_t bits, int64_t group, int64_t n,
              int64_t k) {
  constexpr const char* op = "unpack";
  UnpackArgs args{};
  args.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  Tensor out = empty_on(codes, {n, k}, ScalarType::Byte);
  args.out = mutable_data(out);
  kRun(op, codes, args);
  return out;
}

// -> [N, K] of dtype
template <UnpackRun kRun>
Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                  const std::optional<Tensor>& block_scale, const std::optional<Tensor>& block_zero,
                  const std::optional<Tensor>& table, int64_t bits, int64_t group, int64_t n,
                  int64_t k, ScalarType dtype) {
  constexpr const char* op = "dequantize";
  UnpackArgs args{};
  args.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  args.out_type = float_type(op, "dtype", dtype);
  Tensor out = empty_on(codes, {n, k}, dtype);
  args.out = mutable_data(out);
  kRun(op, codes, args);
  return out;
}

}  // namespace qk
