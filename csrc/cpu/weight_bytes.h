// Where the bytes of a weight lie, for prefetching.
#pragma once
#include "../args.h"
#include "../layout.h"
#include "team.h"

namespace qk {
namespace {  // compiled per instruction set: nothing shared

// Codes, scales and zeros of blocks block .. block + blocks - 1 of 64 rows.
__attribute__((unused)) Upcoming block_bytes(const Weight& w, int64_t block, int64_t blocks) {
  const int64_t units = w.kp / layout::kUnitCols, groups = w.kp / w.group * layout::kUnitRows;
  const int64_t scale = scale_size(w.scale_kind), zero = w.zero_kind == Zero::integer ? 1 : scale;
  const auto part = [&](const void* from, int64_t bytes) {
    const char* at = static_cast<const char*>(from);
    if (at == nullptr) return Upcoming::Part{};
    return Upcoming::Part{at + block * bytes, at + (block + blocks) * bytes};
  };
  return {{part(w.codes, units * layout::unit_bytes(w.bits)), part(w.scale, groups * scale),
           part(w.zero, groups * zero)}};
}

}  // namespace
}  // namespace qk
