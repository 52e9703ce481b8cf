// gate and gate_quant, but for who computes: an activation, times up where there is one. Checks and
// allocates, then calls kRun(op, gate, args) unless there are no rows.
#pragma once
#include <string>

#include "act.h"

namespace qk {

using GateRun = void (*)(const char* op, const Tensor& gate, const GateArgs&);

// gate [M, K], up [M, K] or null
inline GateArgs gate_args(const char* op, const Tensor& gate, const std::optional<Tensor>& up,
                          const std::string& activation) {
  GateArgs a{};
  a.type = float_type(op, "gate", gate.scalar_type());
  a.gate_stride = row_stride(op, "gate", gate);
  a.m = gate.size(0), a.k = gate.size(1);
  check(a.k > 0, op, "gate needs at least one column, got ", shape_of(gate));
  if (up) {
    check(up->scalar_type() == gate.scalar_type(), op, "up must be ", type_name(gate.scalar_type()),
          " like gate, got ", type_name(up->scalar_type()));
    a.up_stride = row_stride(op, "up", *up);
    check(up->size(0) == a.m && up->size(1) == a.k, op, "up must be ", shape_of(gate),
          " like gate, got ", shape_of(*up));
    same_device(op, "up", *up, "gate", gate);
  }
  if (activation == "silu") a.activation = Activation::silu;
  else if (activation == "gelu_tanh") a.activation = Activation::gelu_tanh;
  else if (activation == "gelu_erf") a.activation = Activation::gelu_erf;
  else if (activation == "relu") a.activation = Activation::relu;
  else fail(op, "activation must be silu, gelu_tanh, gelu_erf or relu, got \"", activation, "\"");
  a.gate = data(gate), a.up = data(up);
  return a;
}

template <GateRun kRun>
Tensor gate(const Tensor& gate, const std::optional<Tensor>& up, std::string activation) {
  GateArgs a = gate_args("gate", gate, up, activation);
  Tensor y = empty_on(gate, {a.m, a.k}, gate.scalar_type());
  a.y = mutable_data(y);
  if (a.m > 0) kRun("gate", gate, a);
  return y;
}

template <GateRun kRun>
QuantActTensors gate_quant(const Tensor& gate, const std::optional<Tensor>& up,
                           std::string activation, int64_t act_group) {
  GateArgs a = gate_args("gate_quant", gate, up, activation);
  const int64_t kx = act_columns("gate_quant", "act_group", a.k, act_group);
  QuantActTensors act = new_act(gate, a.m, kx, act_group, &a.act);
  if (a.m > 0) kRun("gate_quant", gate, a);
  return act;
}

}  // namespace qk
