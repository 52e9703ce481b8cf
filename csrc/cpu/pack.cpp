// pack, unpack, dequantize: codes and floats to and from the packed layout (csrc/layout.h).
#include <cstdlib>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../check.h"
#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

// Below this many columns x rows a second thread costs more than it saves.
constexpr int64_t kSerialCodes = 1 << 14;

int team_for(int64_t codes) { return codes < kSerialCodes ? 1 : team_size(); }

// Asks for huge pages under memory that nobody has written to yet, where it is large, unless
// QKERNELS_HUGE_PAGES is 0: decoding reads every weight once per token, and finding 4 KB pages
// takes part of the time. It is a wish that the system may ignore.
void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t huge = 2 << 20, large = 2 * huge;
  const char* setting = std::getenv("QKERNELS_HUGE_PAGES");
  if (bytes < large || (setting && std::string_view(setting) == "0")) return;
  const int64_t at = reinterpret_cast<intptr_t>(memory);
  const int64_t begin = layout::round_up(at, huge), end = (at + bytes) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);
#endif
}

// codes [N, K] uint8 -> [Np, Kp * bits / 8] int8
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
  Tensor out = torch::stable::new_empty(codes, {np, kp * bits / 8}, ScalarType::Char);
  prefer_huge_pages(mutable_data(out), np * kp * bits / 8);
  uint32_t seen = 0;
  const PackArgs args{data<uint8_t>(codes), mutable_data<uint8_t>(out), n, k, kp, int(bits), &seen};
  const Kernels& kernel = kernels();
  run_team(team_for(n * k), [&](Team& team) { kernel.pack(args, team); });
  const uint32_t used = (seen | seen >> 8 | seen >> 16 | seen >> 24) & 0xff;
  check(used >> bits == 0, op, "codes must be below 2^bits = ", 1 << bits,
        ", but some have higher bits set");
  return out;
}

// -> [N, K] uint8
Tensor unpack(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
              const std::optional<Tensor>& block_scale, const std::optional<Tensor>& block_zero,
              const std::optional<Tensor>& table, int64_t bits, int64_t group, int64_t n,
              int64_t k) {
  UnpackArgs args{};
  args.w =
      make_weight("unpack", codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  Tensor out = torch::stable::new_empty(codes, {n, k}, ScalarType::Byte);
  args.out = mutable_data(out);
  const Kernels& kernel = kernels();
  run_team(team_for(n * k), [&](Team& team) { kernel.unpack(args, team); });
  return out;
}

// -> [N, K] of dtype
Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                  const std::optional<Tensor>& block_scale, const std::optional<Tensor>& block_zero,
                  const std::optional<Tensor>& table, int64_t bits, int64_t group, int64_t n,
                  int64_t k, ScalarType dtype) {
  UnpackArgs args{};
  args.w = make_weight("dequantize", codes, scale, zero, block_scale, block_zero, table, bits,
                       group, n, k);
  args.out_type = float_type("dequantize", "dtype", dtype);
  Tensor out = torch::stable::new_empty(codes, {n, k}, dtype);
  args.out = mutable_data(out);
  const Kernels& kernel = kernels();
  run_team(team_for(n * k), [&](Team& team) { kernel.dequantize(args, team); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace
}  // namespace qk
