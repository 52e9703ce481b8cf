// Every function of cuda/ptx.cuh in one kernel, so that a compiler for any architecture sees it.
#include "cuda/ptx.cuh"

namespace qk {

template <class T>
__device__ uint32_t floats(const uint32_t (&a)[4], float x) {
  float d[4] = {x, x, x, x};
  mma_16816<T>(d, a, a[0], a[1]);
  const uint32_t pair = narrow_pair<T>(d[0] + d[1], d[2] + d[3]);
  return fma_pair<T>(pair, a[2], a[3]) + to_bits(narrow<T>(widen(from_bits<T>(uint16_t(a[0])))));
}

__global__ void every_function(const uint32_t* in, uint32_t* out, float* floats_of_others) {
  uint32_t* shared = shared_memory<uint32_t>();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
  dependency_wait();
  copy_async<4>(shared + threadIdx.x, in + threadIdx.x);
  copy_async<8>(shared + 2 * threadIdx.x, in + 2 * threadIdx.x, 4);
  copy_async<16>(shared + 4 * threadIdx.x, in + 4 * threadIdx.x, int(in[0]));
  copy_commit();
  copy_wait<1>();
  copy_wait<0>();
#if QK_SM90
  if (threadIdx.x == 0) {
    mbarrier_init(barrier);
    mbarrier_init_fence();
    mbarrier_expect(barrier, 16);
    bulk_load(shared, in, 16, barrier);
  }
  block_sync();
  mbarrier_wait(barrier, 0);
#else
  out[0] = uint32_t(reinterpret_cast<uintptr_t>(barrier));
#endif
  block_sync();
  warp_sync();
  uint32_t a[4], b[4];
  load_matrices(a, shared + 4 * (threadIdx.x % 32));
  load_matrices<true>(b, shared + 4 * (threadIdx.x % 32));
  int32_t d[4] = {1, 2, 3, 4};
  mma_16832_u8s8(d, a, b[0], b[1]);
  mma_16832_s8s8(d, a, b[2], b[3]);
  uint32_t sum = floats<half_t>(a, load_other_block(floats_of_others)) + floats<bf16_t>(b, 1.f);
  for (int i = 0; i < 4; i++) sum += uint32_t(d[i]);
  sum += load_stream(in).word[0] + load_read_only(in + 4).word[1];
  sum += shuffle_xor(sum, 1) + shuffle(sum, 3) + ballot(sum > 3) + uint32_t(warp_max(int32_t(sum)));
  shared_max(reinterpret_cast<int32_t*>(shared), int32_t(sum));
  sum += uint32_t(shared_add(reinterpret_cast<int32_t*>(shared), 1));
  sum += uint32_t(shared_add(barrier + 1, uint64_t(1)));
  sum += count_around(out + 1, 3) + global_or(out + 2, 5);
  device_fence();
  dependency_launch();
  sum += uint32_t(dot_four(a[0], a[1], 2)) + and_or(a[0], a[1], a[2]) + select_bytes(a[0], a[1], 7);
  const float f = exp2_approx(bits_float(int32_t(sum))) + reciprocal_approx(fma(1.f, 2.f, 3.f));
  sum += uint32_t(round_int(inverse_sqrt(f))) + uint32_t(float_bits(f));
  store_128(out + 4 * threadIdx.x + 4, Words4{{sum, sum, sum, sum}});
}

cudaError_t launch_every_function(const uint32_t* in, uint32_t* out, float* other,
                                  cudaStream_t stream) {
  return launch_dependent(every_function, dim3(1), dim3(64), 8192, stream, in, out, other);
}

}  // namespace qk
