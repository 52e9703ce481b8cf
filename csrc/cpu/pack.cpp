// pack, unpack and dequantize on the CPU; their checks are in pack_ops.h.
#include "../pack_ops.h"

#include <cstdlib>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

uint32_t run_pack(const char*, const Tensor&, PackArgs& args) {
  prefer_huge_pages(args.packed, layout::padded_n(args.n) * args.kp * args.bits / 8);
  uint32_t seen = 0;
  args.seen = &seen;
  const Kernels& kernel = kernels();
  run_team(team_for(args.n * args.k), [&](Team& team) { kernel.pack(args, team); });
  return seen;
}

void run_unpack(const char*, const Tensor&, const UnpackArgs& args) {
  const Kernels& kernel = kernels();
  run_team(team_for(args.w.n * args.w.k), [&](Team& team) { kernel.unpack(args, team); });
}

void run_dequantize(const char*, const Tensor&, const UnpackArgs& args) {
  const Kernels& kernel = kernels();
  run_team(team_for(args.w.n * args.w.k), [&](Team& team) { kernel.dequantize(args, team); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack<run_pack>));
  m.impl("unpack", TORCH_BOX(&unpack<run_unpack>));
  m.impl("dequantize", TORCH_BOX(&dequantize<run_dequantize>));
}

}  // namespace
}  // namespace qk
