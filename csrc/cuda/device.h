// What every CUDA boundary does around its launch.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../check.h"

namespace qk {

// Makes the device of `t` current while it lives, and knows that device's current stream.
class Launch {
 public:
  Launch(const char* op, const Tensor& t) : op_(op), device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == AOTI_TORCH_SUCCESS, op,
          "there is no current stream on cuda:", device_);
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // A launch that fails is reported here, by name, and not at a later synchronization.
  void done(cudaError_t error) const {
    check(error == cudaSuccess, op_, "the kernel did not launch on cuda:", device_, ": ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The dispatcher looks at one argument's device; the others must be there too.
inline void same_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  check(t.is_cuda() && t.get_device_index() == first.get_device_index(), op, name, " must be on cuda:",
        first.get_device_index(), ", like the other arguments");
}

}  // namespace qk
