// gate and gate_quant on CUDA; their checks are in gate_ops.h, the kernels in gate.cuh.
#include "gate.cuh"

#include "../gate_ops.h"
#include "device.h"

namespace qk {
namespace {

void run(const char* op, const Tensor& gate, const GateArgs& args) {
  launch_on(op, gate, [&](cudaStream_t stream) { return launch_gate(args, stream); });
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("gate", TORCH_BOX(&gate<run>));
  m.impl("gate_quant", TORCH_BOX(&gate_quant<run>));
}

}  // namespace
}  // namespace qk
