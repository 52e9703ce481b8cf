// linear and linear_quant on CUDA; their checks are in linear_ops.h.
//
// 16-bit activations of few tokens are multiplied as they are (linear_float.cuh), those of many,
// and float32 ones of any number, by a matrix that is dequantized into memory first: tensor cores
// take 16-bit activations only, and torch's matrix product is the best for dense matrices that
// there is. int8 activations have kernels of their own.
#include <array>

#include "../linear_ops.h"
#include "dense.cuh"
#include "workspace.h"

namespace qk {
namespace {

// Up to so many tokens the kernels on packed codes are faster. Predicted for 8192 x 8192 on an
// H200: a token takes them 0.26 us (at half of the peak of tensor cores), and a dense product 0.17
// us beyond the 35 us in which the matrix is written, so that they meet at about 390.
constexpr int64_t kPackedTokens = 384;
// Of the dequantized matrix there are so many bytes at a time; a larger one goes by rows.
#ifdef QK_EMULATE_CUDA
constexpr int64_t kDenseBytes = 64 << 10;  // tests have small ones
#else
constexpr int64_t kDenseBytes = 256 << 20;
#endif

// y = x w^T; y may be columns of a matrix.
void matmul_into(const Tensor& x, const Tensor& w, const Tensor& y) {
  Tensor rows = w;
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(torch::stable::transpose(rows, 0, 1)), from(y)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // y once more
}

// The blocks of 64 rows from `row` on, `rows` of them at most, as a weight of its own.
Weight rows_of(const Weight& w, int64_t row, int64_t rows) {
  const int64_t block = row / layout::kUnitRows, groups = w.kp / w.group;
  const int64_t at = block * groups * 64, block_at = block * (w.kp / layout::kBlockGroup) * 64;
  const auto bytes = [](const void* p, int64_t offset) {
    return p ? static_cast<const uint8_t*>(p) + offset : nullptr;
  };
  Weight part = w;
  part.codes += layout::unit_offset(row, 0, w.kp, w.bits);
  part.scale = bytes(w.scale, at * scale_size(w.scale_kind));
  part.zero = bytes(w.zero, w.zero_kind == Zero::integer ? at : at * scale_size(w.scale_kind));
  if (w.block_scale) part.block_scale += block_at;
  if (w.block_zero) part.block_zero += block_at;
  part.n = w.n - row < rows ? w.n - row : rows;
  return part;
}

cudaError_t run_dense(const Tensor& x, const Tensor& y, const LinearArgs& args,
                      cudaStream_t stream) {
  const int64_t row_bytes = args.w.k * int64_t(args.x_type == Dtype::f32 ? 4 : 2);
  int64_t rows = kDenseBytes / row_bytes / layout::kUnitRows * layout::kUnitRows;
  rows = rows < layout::kUnitRows ? layout::kUnitRows : rows < args.w.n ? rows : args.w.n;
  const Tensor dense = empty_on(x, {rows, args.w.k});
  void* memory = mutable_data(dense);
  Tensor all = y, dense_rows = dense;
  for (int64_t row = 0; row < args.w.n; row += rows) {
    UnpackArgs unpack{rows_of(args.w, row, rows), memory, args.x_type};
    if (cudaError_t error = launch_dequantize(unpack, stream); error != cudaSuccess) return error;
    const bool whole = unpack.w.n == args.w.n;
    if (whole) matmul_into(x, dense, y);
    else
      matmul_into(x, torch::stable::narrow(dense_rows, 0, 0, unpack.w.n),
                  torch::stable::narrow(all, 1, row, unpack.w.n));
  }
#ifdef QK_EMULATE_CUDA
  emu::written(args.y);
#endif
  return args.bias || args.residual ? launch_addends(args, stream) : cudaSuccess;
}

// Counters that suffice for any way to cut y into tiles: of 64 rows and 8 tokens at least.
int64_t most_tiles(const LinearArgs& args) {
  const int64_t tiles = (args.w.n + 63) / 64 * ((args.m + 7) / 8);
  return tiles < kLinearCounters ? tiles : kLinearCounters;
}

cudaError_t run_packed(const char* op, const Tensor& x, LinearArgs& args, QuantizeActArgs* quantize,
                       cudaStream_t stream) {
  DeviceLimits limits{};
  if (cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
  const bool int8 = args.x == nullptr;
  const int64_t partial =
      int8 ? linear_int8_scratch(args, limits) : linear_float_scratch(args, limits);
  // Of activations that are quantized here: codes, then scales, then sums, each at a multiple of
  // 256 bytes.
  const int64_t kx = args.act.kx;
  const int64_t scale_at = quantize ? layout::round_up(args.m * kx, 256) : 0;
  const int64_t sums_at =
      quantize ? scale_at + layout::round_up(args.m * (kx / args.act.group) * 4, 256) : 0;
  const int64_t partial_at = quantize ? sums_at + layout::round_up(args.m * (kx / 16) * 2, 256) : 0;
  Workspace workspace(op, x, stream);
  auto* scratch = static_cast<uint8_t*>(workspace.scratch(partial_at + partial));
  if (quantize) {
    QuantActOut& out = quantize->out;
    args.act.codes = out.codes = reinterpret_cast<int8_t*>(scratch);
    args.act.scale = out.scale = reinterpret_cast<float*>(scratch + scale_at);
    args.act.sums = out.sums = reinterpret_cast<int16_t*>(scratch + sums_at);
    if (cudaError_t error = launch_quantize_act(*quantize, stream); error != cudaSuccess)
      return error;
  }
  // Weights are asked for before the predecessor has ended in captured graphs alone: those hold
  // steps of a model, which do not write weights, while an eager linear may follow what packs or
  // copies them.
#ifdef QK_EMULATE_CUDA
  static bool turn = false;  // both ways are tested
  args.weights_settled = turn = !turn;
  if (!args.weights_settled) emu::expect_new_constants();
#else
  cudaStreamCaptureStatus capture{};
  if (cudaError_t error = cudaStreamIsCapturing(stream, &capture); error != cudaSuccess)
    return error;
  args.weights_settled = capture != cudaStreamCaptureStatusNone;
#endif
  uint32_t* counters = nullptr;
  if (partial > 0)
    if (cudaError_t error = workspace.counters(most_tiles(args), &counters); error != cudaSuccess)
      return error;
  void* sums = partial > 0 ? scratch + partial_at : nullptr;
  return int8 ? launch_linear_int8(args, sums, counters, stream)
              : launch_linear_float(args, sums, counters, stream);
}

void run(const char* op, const Tensor& x, const Tensor& y, LinearArgs& args,
         QuantizeActArgs* quantize) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const Weight& w = args.w;
  check(aligned(w.codes) && aligned(w.scale) && aligned(w.zero) && aligned(w.block_scale) &&
            aligned(w.block_zero) && aligned(w.table) && aligned(args.act.codes),
        op, "the tensors of the weight (and act_codes) must start at multiples of 16 bytes");
  const bool dense = args.x && (args.x_type == Dtype::f32 || args.m > kPackedTokens);
  launch_on(op, x, [&](cudaStream_t stream) {
    return dense ? run_dense(x, y, args, stream) : run_packed(op, x, args, quantize, stream);
  });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("linear", TORCH_BOX(&linear<run>));
  m.impl("linear_quant", TORCH_BOX(&linear_quant<run>));
}

}  // namespace
}  // namespace qk
