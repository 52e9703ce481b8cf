// activation(gate) * up, as floats or as int8 activations (quantize_act.cuh). float32 inside; the
// polynomials are those of cpu/isa/gate.cpp, so that both are within the same bounds.
//
// - gate_kernel: rows whose pieces of 16 bytes are aligned, two pieces per thread.
// - gate_any_kernel: any alignment, an element per thread.
#pragma once
#include "../args.h"
#include "quantize_act.cuh"

namespace qk {

// exp within 2 ulp for -87.3 <= x <= 88.3; e^-87.3 below, +inf above; NaN stays.
__device__ __forceinline__ float gate_exp(float x) {
  const float v = x < -87.3f ? -87.3f : x > 89.f ? 89.f : x;
  // Adding 1.5 * 2^23 rounds v / ln 2 to the integer n, which then stands in the lowest bits.
  constexpr float kShift = 12582912.f;
  const float shifted = fma(v, 1.44269504f, kShift), n = shifted - kShift;
  float r = fma(n, -0.693145752f, v);  // ln 2 in two parts
  r = fma(n, -1.42860677e-6f, r);
  float p = 1.3888889e-3f;
  p = fma(p, r, 8.3333333e-3f);
  p = fma(p, r, 4.1666667e-2f);
  p = fma(p, r, 1.6666667e-1f);
  p = fma(p, r, 0.5f);
  p = fma(p, r, 1.f);
  p = fma(p, r, 1.f);
  // 2^n: the bits of kShift above those of n leave the word, and n = 128 gives infinity.
  return p * bits_float(int32_t((uint32_t(float_bits(shifted)) << 23) + 0x3f800000u));
}

// x * Phi(x), with Phi(-|x|) = erfcx(z) * exp(-z^2) / 2 for z = |x| / sqrt 2; erfcx is a polynomial
// in (z - 3) / (z + 3). See cpu/isa/gate.cpp.
__device__ __forceinline__ float gelu_erf(float x) {
  const float size = bits_float(magnitude(x));
  const float scaled = size * 0.70710678f, z = scaled > 10.f ? 10.f : scaled;
  const float t = (z - 3.f) / (z + 3.f);
  float p = 5.3706684e-05f;
  p = fma(p, t, 2.4406856e-05f);
  p = fma(p, t, -0.000595398f);
  p = fma(p, t, 0.00071869587f);
  p = fma(p, t, 0.0042700227f);
  p = fma(p, t, -0.024394935f);
  p = fma(p, t, 0.07166559f);
  p = fma(p, t, -0.15011571f);
  p = fma(p, t, 0.24560381f);
  p = fma(p, t, -0.32623357f);
  p = fma(p, t, 0.17900115f);
  // x^2 = square + rest exactly; exp(-rest / 2) is 1 - rest / 2.
  const float square = x * x, rest = fma(x, x, -square);
  const float tail = 0.5f * p * gate_exp(-0.5f * square) * (1.f - 0.5f * rest);
  const float bounded = size < 14.f ? tail : 0.f;  // beyond, square may be infinite, and rest NaN
  return x * (x < 0.f ? bounded : 1.f - bounded);
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::silu: return x / (1.f + gate_exp(-x));
    case Activation::gelu_erf: return gelu_erf(x);
    case Activation::relu: return x < 0.f ? 0.f : x;  // NaN stays
    default:
      // 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      return x / (1.f + gate_exp(-x * fma(x * x, 0.071354816f, 1.5957691f)));
  }
}

// What gate_quant quantizes and gate stores; see ActivationSource.
template <class T>
struct GateSource {
  static constexpr int kPer = 16 / sizeof(T);
  struct Raw {
    Words4 gate, up;
  };
  const T* gate;  // [M, K]
  const T* up;    // [M, K] or null
  int64_t k, gate_stride, up_stride;
  Activation activation;

  __device__ __forceinline__ Raw load(int64_t row, int64_t col) const {
    Raw raw{load_stream(gate + row * gate_stride + col), {}};
    if (up) raw.up = load_stream(up + row * up_stride + col);
    return raw;
  }
  __device__ __forceinline__ void values(const Raw& raw, float (&v)[kPer]) const {
    unpack<T>(raw.gate, v);
#pragma unroll
    for (int j = 0; j < kPer; j++) v[j] = activate(activation, v[j]);
    if (up == nullptr) return;
    float factor[kPer];
    unpack<T>(raw.up, factor);
#pragma unroll
    for (int j = 0; j < kPer; j++) v[j] *= factor[j];
  }
  __device__ __forceinline__ float value(int64_t row, int64_t col) const {
    const float v = activate(activation, widen(gate[row * gate_stride + col]));
    return up ? v * widen(up[row * up_stride + col]) : v;
  }
};

constexpr int kGateThreads = 256;
constexpr int kGateTurns = 2;  // pieces of a thread, so that four loads are on their way

// y [M, K]; pieces: of all rows
template <class T>
__global__ void __launch_bounds__(kGateThreads)
    gate_kernel(const GateSource<T> source, T* y, const int64_t pieces) {
  constexpr int kPer = GateSource<T>::kPer;
  const int64_t row_pieces = source.k / kPer;
  auto piece = [&](int turn) {
    return (int64_t(blockIdx.x) * kGateTurns + turn) * kGateThreads + threadIdx.x;
  };
  typename GateSource<T>::Raw raw[kGateTurns];
#pragma unroll
  for (int turn = 0; turn < kGateTurns; turn++) {
    if (piece(turn) >= pieces) continue;
    const int64_t row = piece(turn) / row_pieces;
    raw[turn] = source.load(row, (piece(turn) - row * row_pieces) * kPer);
  }
#pragma unroll
  for (int turn = 0; turn < kGateTurns; turn++) {
    if (piece(turn) >= pieces) continue;
    float v[kPer];
    source.values(raw[turn], v);
    store_128(y + piece(turn) * kPer, pack<T>(v));
  }
}

template <class T>
__global__ void __launch_bounds__(kGateThreads)
    gate_any_kernel(const GateSource<T> source, T* y, const int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kGateThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / source.k;
  y[i] = narrow<T>(source.value(row, i - row * source.k));
}

template <class T>
cudaError_t launch_gate_typed(const GateArgs& args, cudaStream_t stream) {
  using Source = GateSource<T>;
  constexpr int kPer = Source::kPer;
  const Source source{static_cast<const T*>(args.gate),
                      static_cast<const T*>(args.up),
                      args.k,
                      args.gate_stride,
                      args.up_stride,
                      args.activation};
  const bool pointers_aligned = on_16_bytes(args.gate) && on_16_bytes(args.up) &&
                                on_16_bytes(args.y) && on_16_bytes(args.act.codes);
  const bool aligned = pointers_aligned && args.k % kPer == 0 && args.gate_stride % kPer == 0 &&
                       args.up_stride % kPer == 0;
  if (args.act.codes) return launch_quantize(source, args.act, args.m, aligned, stream);
  // 2^31 blocks of 256 values or more are more than any memory holds.
  const int64_t count = args.m * args.k, pieces = count / kPer;
  const int64_t items = aligned ? pieces : count, per_block = kGateThreads * (aligned ? 2 : 1);
  const dim3 grid(unsigned((items + per_block - 1) / per_block));
  return launch(aligned ? gate_kernel<T> : gate_any_kernel<T>, grid, dim3(kGateThreads), 0, stream,
                source, static_cast<T*>(args.y), items);
}

// y or act is written, not both.
inline cudaError_t launch_gate(const GateArgs& args, cudaStream_t stream) {
  if (args.m == 0) return cudaSuccess;
  switch (args.type) {
    case Dtype::f32: return launch_gate_typed<float>(args, stream);
    case Dtype::f16: return launch_gate_typed<half_t>(args, stream);
    case Dtype::bf16: return launch_gate_typed<bf16_t>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qk
