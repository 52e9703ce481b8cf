// embedding, but for who computes: rows of a packed table as floats. Checks and allocates, then
// calls kRun(op, codes, args) unless there are no ids.
#pragma once
#include "check.h"

namespace qk {

// Where contents are unchecked, ids may be anything, and those outside 0 .. N - 1 give a row of
// NaN.
using EmbeddingRun = void (*)(const char* op, const Tensor& codes, const EmbeddingArgs&);

// ids [T] int64, W -> [T, K] of dtype, times multiplier
template <EmbeddingRun kRun, Contents kContents>
Tensor embedding(const Tensor& ids, const Tensor& codes, const Tensor& scale,
                 const std::optional<Tensor>& zero, const std::optional<Tensor>& block_scale,
                 const std::optional<Tensor>& block_zero, const std::optional<Tensor>& table,
                 int64_t bits, int64_t group, int64_t n, int64_t k, ScalarType dtype,
                 double multiplier) {
  constexpr const char* op = "embedding";
  expect(op, "ids", ids, ScalarType::Long, {-1});
  EmbeddingArgs args{};
  args.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  args.y_type = float_type(op, "dtype", dtype);
  same_device(op, "codes", codes, "ids", ids);
  args.t = ids.size(0);
  args.ids = data<int64_t>(ids);
  if constexpr (kContents == Contents::checked)
    for (int64_t i = 0; i < args.t; i++)
      check(args.ids[i] >= 0 && args.ids[i] < n, op, "ids must be from 0 to ", n - 1, ", got ",
            args.ids[i]);
  Tensor out = empty_on(codes, {args.t, k}, dtype);
  args.y = mutable_data(out);
  args.multiplier = float(multiplier);
  if (args.t > 0) kRun(op, codes, args);
  return out;
}

}  // namespace qk
