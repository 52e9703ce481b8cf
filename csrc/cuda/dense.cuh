// What is left of a linear whose product torch computed: y += bias + residual, in float32.
#pragma once
#include "../args.h"
#include "ptx.cuh"

namespace qk {

constexpr int kAddendThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAddendThreads) addends_kernel(const LinearArgs args) {
  const int64_t n = int64_t(blockIdx.x) * kAddendThreads + threadIdx.x;
  if (n >= args.w.n) return;
  const float bias = args.bias ? static_cast<const float*>(args.bias)[n] : 0.f;
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  for (int64_t m = blockIdx.y; m < args.m; m += gridDim.y) {
    float v = widen(y[m * args.y_stride + n]) + bias;
    if (residual) v += widen(residual[m * args.residual_stride + n]);
    y[m * args.y_stride + n] = narrow<T>(v);
  }
}

inline cudaError_t launch_addends(const LinearArgs& args, cudaStream_t stream) {
  const dim3 grid(unsigned((args.w.n + kAddendThreads - 1) / kAddendThreads),
                  unsigned(args.m < 65535 ? args.m : 65535));
  const dim3 block(kAddendThreads);
  switch (args.y_type) {
    case Dtype::f32: return launch(addends_kernel<float>, grid, block, 0, stream, args);
    case Dtype::f16: return launch(addends_kernel<half_t>, grid, block, 0, stream, args);
    case Dtype::bf16: return launch(addends_kernel<bf16_t>, grid, block, 0, stream, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
