// Products of registers and nothing else, on the instructions that the set's kernels multiply with:
// the ceilings that kernels are measured against.
#include "simd.h"

namespace qk::QK_ISA {
namespace {

// Independent sums: more than the latency of a multiply-add (4 or 5 cycles) times two a cycle.
// AVX2 has 16 registers for them and their operands.
constexpr int kChains = 12;

// v as if something else had just written it: its products are computed again, not hoisted. In a
// register, where the set has one so wide: the emulated AVX-512 does not.
template <class V>
QK_INLINE void renew(V& v) {
#if defined(__x86_64__) && !defined(QK_EMULATE_AVX512)
  asm volatile("" : "+x"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

// Runs `multiply_add(sum)` on every chain, steps times. Returns how often.
template <class V, class F>
QK_INLINE int64_t run_chains(int64_t steps, F multiply_add) {
  V sum[kChains] = {};
  for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) multiply_add(sum[c]);
  for (V& s : sum) renew(s);  // read by somebody, so that it is computed
  return steps * kChains;
}

}  // namespace

// Two operations per product. AVX-512: vpdpbusd. AVX2: vpmaddubsw, whose 16-bit sums have to be
// added. Else: 16-bit products and sums.
int64_t peak_int8(int64_t steps) {
#if defined(QK_NATIVE_AVX512)
  typedef int32_t Sums __attribute__((vector_size(64)));
  Sums x = {1};
  return 2 * 64 * run_chains<Sums>(steps, [&](Sums& sum) __attribute__((always_inline)) {
           renew(x);
           sum = (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)x);
         });
#elif defined(QK_ISA_AVX2) || defined(QK_ISA_AVX512)
  typedef uint16_t Sums __attribute__((vector_size(32)));
  Sums x = {1};
  return 2 * 32 * run_chains<Sums>(steps, [&](Sums& sum) __attribute__((always_inline)) {
           renew(x);
           sum += (Sums)_mm256_maddubs_epi16((__m256i)x, (__m256i)x);
         });
#else
  typedef uint16_t Sums __attribute__((vector_size(16)));
  Sums x = {1};
  return 2 * 8 * run_chains<Sums>(steps, [&](Sums& sum) __attribute__((always_inline)) {
           renew(x);
           sum += x * x;
         });
#endif
}

int64_t peak_float32(int64_t steps) {
  VF x = splat(0.f);
  return 2 * W * run_chains<VF>(steps, [&](VF& sum) __attribute__((always_inline)) {
           renew(x);
           sum = fma(x, x, sum);
         });
}

}  // namespace qk::QK_ISA
