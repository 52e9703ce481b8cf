// embedding: rows of a packed table as floats.
#include "../check.h"
#include "kernels.h"
#include "run.h"

namespace qk {
namespace {

// ids [T] int64, W -> [T, K] of dtype, times multiplier
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
  args.t = ids.size(0);
  args.ids = data<int64_t>(ids);
  for (int64_t i = 0; i < args.t; i++)
    check(args.ids[i] >= 0 && args.ids[i] < n, op, "ids must be from 0 to ", n - 1, ", got ",
          args.ids[i]);
  Tensor out = torch::stable::new_empty(codes, {args.t, k}, dtype);
  args.y = mutable_data(out);
  args.multiplier = float(multiplier);
  const bool small = args.t * k < 1 << 14;
  const Kernels& kernel = kernels();
  run_team(small ? 1 : team_size(), [&](Team& team) { kernel.embedding(args, team); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding)); }

}  // namespace
}  // namespace qk
