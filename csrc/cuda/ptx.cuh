// Every instruction and conversion that device code takes from the GPU, behind functions of our
// own: kernels include this and nothing else of CUDA, so that a host version of this header can run
// them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qk {

struct alignas(16) Words4 {
  uint32_t word[4];
};

// 16 bytes that are read once: past L1, which then keeps what is read again (weights, statistics).
__device__ __forceinline__ Words4 load_stream(const void* p) {
  Words4 r;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p));
  return r;
}
// 16 bytes that other blocks read too and nobody writes.
__device__ __forceinline__ Words4 load_shared_input(const void* p) {
  Words4 r;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p));
  return r;
}
__device__ __forceinline__ void store_128(void* p, const Words4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
__device__ __forceinline__ int32_t warp_max(int32_t v) {
  return __reduce_max_sync(0xffffffffu, v);
}  // sm_80
__device__ __forceinline__ void shared_max(int32_t* p, int32_t v) { atomicMax(p, v); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ void block_sync() { __syncthreads(); }

__device__ __forceinline__ int32_t float_bits(float v) { return __float_as_int(v); }
__device__ __forceinline__ float bits_float(int32_t v) { return __int_as_float(v); }
__device__ __forceinline__ int round_int(float v) { return __float2int_rn(v); }  // halves to even
// 1 / sqrt(v), correctly rounded twice; rsqrt.approx would differ from the CPU in the last bit or
// two.
__device__ __forceinline__ float inverse_sqrt(float v) { return __frcp_rn(__fsqrt_rn(v)); }

// Conversions of one element; T is float, __half or __nv_bfloat16. Narrowing rounds to nearest
// even.
template <class T>
__device__ __forceinline__ float widen(T v) {
  if constexpr (sizeof(T) == 4) return v;
  else return float(v);
}
template <class T>
__device__ __forceinline__ T narrow(float v) {
  if constexpr (sizeof(T) == 4) return v;
  else return T(v);
}

// The 16 / sizeof(T) elements of 16 bytes.
template <class T>
__device__ __forceinline__ void unpack(const Words4& words, float (&out)[16 / sizeof(T)]) {
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4) {
      out[w] = __uint_as_float(words.word[w]);
    } else {
      T low, high;
      const uint16_t l = uint16_t(words.word[w]), h = uint16_t(words.word[w] >> 16);
      __builtin_memcpy(&low, &l, 2);
      __builtin_memcpy(&high, &h, 2);
      out[2 * w] = widen(low);
      out[2 * w + 1] = widen(high);
    }
  }
}
template <class T>
__device__ __forceinline__ Words4 pack(const float (&in)[16 / sizeof(T)]) {
  Words4 words;
#pragma unroll
  for (int w = 0; w < 4; w++) {
    if constexpr (sizeof(T) == 4) {
      words.word[w] = __float_as_uint(in[w]);
    } else {
      const T low = narrow<T>(in[2 * w]), high = narrow<T>(in[2 * w + 1]);
      uint16_t l, h;
      __builtin_memcpy(&l, &low, 2);
      __builtin_memcpy(&h, &high, 2);
      words.word[w] = l | uint32_t(h) << 16;
    }
  }
  return words;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace qk
