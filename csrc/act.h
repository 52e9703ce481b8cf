// The three tensors of quantized activations, as outputs.
#pragma once
#include <tuple>

#include "check.h"

namespace qk {

using QuantActTensors = std::tuple<Tensor, Tensor, Tensor>;  // codes, scale, sums

inline int64_t act_columns(const char* op, const char* name, int64_t k, int64_t group) {
  check_group(op, name, group);
  return layout::round_up(k, group);
}

// codes [M, Kx] int8, scale [M, Kx / group] float32, sums [M, Kx / 16] int16 beside `like`, and out
// set to them.
inline QuantActTensors new_act(const Tensor& like, int64_t m, int64_t kx, int64_t group,
                               QuantActOut* out) {
  Tensor codes = empty_on(like, {m, kx}, ScalarType::Char);
  Tensor scale = empty_on(like, {m, kx / group}, ScalarType::Float);
  Tensor sums = empty_on(like, {m, kx / 16}, ScalarType::Short);
  *out = {mutable_data<int8_t>(codes), mutable_data<float>(scale), mutable_data<int16_t>(sums), kx,
          int(group)};
  return {codes, scale, sums};
}

}  // namespace qk
