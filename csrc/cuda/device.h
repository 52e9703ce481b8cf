// What every CUDA boundary does around its launches.
#pragma once
#include "../check.h"
#include "ptx.cuh"

#ifdef QK_EMULATE_CUDA
#define QK_DEVICE_KEY CPU  // tests hand it tensors of the CPU
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define QK_DEVICE_KEY CUDA
#endif

namespace qk {

// Packed codes are read in runs of 16 bytes. Tensors of their own are aligned; views need not be.
inline void check_on_16_bytes(const char* op, const char* name, const void* p) {
  check(reinterpret_cast<uintptr_t>(p) % 16 == 0, op, name,
        " must start at a multiple of 16 bytes in memory; call .clone() on it");
}

#ifdef QK_EMULATE_CUDA
struct EmulatedOp {
  explicit EmulatedOp(const char* op) { emu::begin(op); }
  ~EmulatedOp() { emu::end(); }
};
#endif

// Makes the device of `t` current, takes its current stream, and calls launch(stream) ->
// cudaError_t, which may launch several kernels. One that fails is reported here, by the op's name,
// and not at a later synchronization.
template <class F>
void launch_on(const char* op, const Tensor& t, const F& launch) {
#ifdef QK_EMULATE_CUDA
  const EmulatedOp emulated(op);
  const cudaError_t error = launch(cudaStream_t(nullptr));
  check(error == cudaSuccess, op, "the kernel did not launch: ", cudaGetErrorString(error));
#else
  const int32_t device = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op,
        "cuda:", device, " has no current stream");
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  check(error == cudaSuccess, op, "the kernel did not launch on cuda:", device, ": ",
        cudaGetErrorString(error));
#endif
}

}  // namespace qk
