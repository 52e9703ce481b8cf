// Launches that more than one boundary uses. Torch-free; each is defined beside its kernels, so
// that a kernel is compiled once.
#pragma once
#include "../args.h"
#include "ptx.cuh"

namespace qk {

cudaError_t launch_quantize_act(const QuantizeActArgs& args, cudaStream_t stream);
cudaError_t launch_dequantize(const UnpackArgs& args, cudaStream_t stream);

// y = x W^T + bias + residual of float16 or bfloat16 activations (args.x). `scratch` is
// linear_float_scratch bytes, 256-byte aligned, of which the kernels write what they read;
// `counters` are kLinearCounters zeros, which a launch leaves zero.
int64_t linear_float_scratch(const LinearArgs& args, const DeviceLimits& limits);
cudaError_t launch_linear_float(const LinearArgs& args, void* scratch, uint32_t* counters,
                                cudaStream_t stream);
// The same of int8 activations (args.act).
int64_t linear_int8_scratch(const LinearArgs& args, const DeviceLimits& limits);
cudaError_t launch_linear_int8(const LinearArgs& args, void* scratch, uint32_t* counters,
                               cudaStream_t stream);
// Blocks that split K between them count their arrivals here, one counter per tile of y.
constexpr int64_t kLinearCounters = 1 << 14;

}  // namespace qk
