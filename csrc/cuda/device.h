// What every CUDA boundary does around its launch.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../check.h"

namespace qk {

// Makes the device of `t` current, takes its current stream, and calls launch(stream) ->
// cudaError_t. A launch that fails is reported here, by the op's name, and not at a later
// synchronization.
template <class F>
void launch_on(const char* op, const Tensor& t, const F& launch) {
  const int32_t device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op,
        "cuda:", device, " has no current stream");
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  check(error == cudaSuccess, op, "the kernel did not launch on cuda:", device, ": ",
        cudaGetErrorString(error));
}

}  // namespace qk
