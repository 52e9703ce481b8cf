// Boundary of the ops linear and linear_quant.
#include <memory>

#include "../check.h"
#include "linear.h"
#include "run.h"

namespace qk {
namespace {

void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t n) {
  if (bias) expect(op, "bias", *bias, ScalarType::Float, {n});
}

// Threads for a call. A second one takes 5 us to start, in which one core does this much by itself:
// [576, 576] of 4 bits with one token takes 15.7 us alone and 19.7 us with two (Zen 3).
int team_for(const LinearArgs& a) {
  const int64_t bytes = a.w.n * a.w.kp * a.w.bits / 8;
  const bool small = bytes * a.m <= (192 << 10);
  return small ? 1 : team_size();
}

// One allocation, cut into pieces that start on cache lines.
class Scratch {
 public:
  int64_t reserve(int64_t bytes) {
    const int64_t at = size_;
    size_ += layout::round_up(bytes, 64);
    return at;
  }
  // What a decode step needs lies in memory that each thread keeps: asking torch for it takes 4 us,
  // as long as a small matrix.
  void allocate(const Tensor& like) {
    constexpr int64_t kept = 256 << 10;
    if (size_ <= kept) {
      thread_local std::unique_ptr<char[]> memory(new char[kept + 64]);
      base_ =
          reinterpret_cast<char*>(layout::round_up(reinterpret_cast<intptr_t>(memory.get()), 64));
      return;
    }
    store_ = torch::stable::new_empty(like, {size_}, ScalarType::Byte);
    base_ = mutable_data<char>(*store_);
  }
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t size_ = 0;
  std::optional<Tensor> store_;
  char* base_ = nullptr;
};

// linear(Tensor x, <weight>, Tensor? bias, str act, int act_group) -> Tensor
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale,
              const std::optional<Tensor>& zero, const std::optional<Tensor>& block_scale,
              const std::optional<Tensor>& block_zero, const std::optional<Tensor>& table,
              int64_t bits, int64_t group, int64_t n, int64_t k, const std::optional<Tensor>& bias,
              std::string act, int64_t act_group) {
  const char* op = "linear";
  LinearArgs a{};
  a.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  a.x_stride = row_stride(op, "x", x);
  a.x_type = a.y_type = float_type(op, "x", x.scalar_type());
  check(x.size(1) == k, op, "x must be [M, ", k, "], got ", shape_of(x));
  check_bias(op, bias, n);
  const bool int8 = act == "int8";
  check(int8 || act == "float", op, "act must be \"int8\" or \"float\", got \"", act, "\"");
  if (int8) check_linear_groups(op, group, act_group);
  a.m = x.size(0), a.y_stride = n, a.bias = data(bias);

  Tensor y = torch::stable::new_empty(x, {a.m, n});
  a.y = mutable_data(y);
  if (a.m == 0) return y;
  const Kernels& kernel = kernels();
  const int team_size_now = team_for(a);
  Scratch scratch;
  QuantizeActArgs quantize{};
  int64_t codes_at = 0, scale_at = 0, sums_at = 0;
  if (int8) {
    const int64_t kx = layout::round_up(k, act_group);
    a.act.kx = kx, a.act.group = int(act_group);
    codes_at = scratch.reserve(a.m * kx);
    scale_at = scratch.reserve(a.m * (kx / act_group) * int64_t(sizeof(float)));
    sums_at = scratch.reserve(a.m * (kx / 16) * int64_t(sizeof(int16_t)));
  } else {
    a.x = data(x);
  }
  const int64_t kernel_at = scratch.reserve(kernel.linear_scratch(a, team_size_now));
  scratch.allocate(x);
  if (int8) {
    a.act.codes = scratch.at<int8_t>(codes_at);
    a.act.scale = scratch.at<float>(scale_at);
    a.act.sums = scratch.at<int16_t>(sums_at);
    quantize = {data(x),
                a.x_type,
                a.m,
                k,
                a.x_stride,
                {scratch.at<int8_t>(codes_at), scratch.at<float>(scale_at),
                 scratch.at<int16_t>(sums_at), a.act.kx, a.act.group}};
  }
  run_team(team_size_now, [&](Team& team) {
    if (int8) {
      kernel.quantize_act(quantize, team);
      team.sync();
    }
    kernel.linear(a, scratch.at(kernel_at), team);
  });
  return y;
}

// linear_quant(Tensor act_codes, Tensor act_scale, Tensor act_sums, <weight>, Tensor? bias,
// ScalarType dtype) -> Tensor The group of the activations follows from the shapes of act_codes [M,
// Kx] and act_scale [M, Kx / g].
Tensor linear_quant(const Tensor& act_codes, const Tensor& act_scale, const Tensor& act_sums,
                    const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                    const std::optional<Tensor>& block_scale,
                    const std::optional<Tensor>& block_zero, const std::optional<Tensor>& table,
                    int64_t bits, int64_t group, int64_t n, int64_t k,
                    const std::optional<Tensor>& bias, ScalarType dtype) {
  const char* op = "linear_quant";
  LinearArgs a{};
  a.w = make_weight(op, codes, scale, zero, block_scale, block_zero, table, bits, group, n, k);
  a.y_type = float_type(op, "dtype", dtype);
  expect(op, "act_codes", act_codes, ScalarType::Char, {-1, -1});
  const int64_t m = act_codes.size(0), kx = act_codes.size(1);
  expect(op, "act_scale", act_scale, ScalarType::Float, {m, -1});
  const int64_t act_groups = act_scale.size(1), act_group = act_groups > 0 ? kx / act_groups : 0;
  check(act_group >= 16 && act_group % 16 == 0 && kx == act_groups * act_group &&
            kx == layout::round_up(k, act_group),
        op, "act_codes must have k = ", k, " columns rounded up to whole groups of act_scale, got ",
        shape_of(act_codes), " and ", shape_of(act_scale));
  expect(op, "act_sums", act_sums, ScalarType::Short, {m, kx / 16});
  check_bias(op, bias, n);
  check_linear_groups(op, group, act_group);
  a.m = m, a.y_stride = n, a.bias = data(bias);
  a.act = {data<int8_t>(act_codes), data<float>(act_scale), data<int16_t>(act_sums), kx,
           int(act_group)};

  Tensor y = torch::stable::new_empty(act_codes, {m, n}, dtype);
  a.y = mutable_data(y);
  if (m == 0) return y;
  const Kernels& kernel = kernels();
  const int team_size_now = team_for(a);
  Scratch scratch;
  const int64_t kernel_at = scratch.reserve(kernel.linear_scratch(a, team_size_now));
  scratch.allocate(act_codes);
  run_team(team_size_now, [&](Team& team) { kernel.linear(a, scratch.at(kernel_at), team); });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_quant", TORCH_BOX(&linear_quant));
}

}  // namespace
}  // namespace qk
