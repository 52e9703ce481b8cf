// Included first by every file of isa/. The build compiles each of them once per instruction set,
// with exactly one of QK_ISA_SCALAR, QK_ISA_AVX2 and QK_ISA_AVX512 defined. Everything lives in the
// set's own namespace, and helpers in an anonymous one inside it: a weak symbol shared between sets
// would put AVX-512 code into the scalar path.
#pragma once
#include "../kernels.h"

#if defined(QK_ISA_AVX512)
#define QK_ISA avx512
#elif defined(QK_ISA_AVX2)
#define QK_ISA avx2
#elif defined(QK_ISA_SCALAR)
#define QK_ISA scalar
#else
#error "isa/ files are compiled with one of QK_ISA_SCALAR, QK_ISA_AVX2, QK_ISA_AVX512"
#endif

#define QK_INLINE inline __attribute__((always_inline))

namespace qk::QK_ISA {

void linear(const LinearArgs&, void* scratch, Team&);
int64_t linear_scratch(const LinearArgs&, int team);
void quantize_act(const QuantizeActArgs&, Team&);
void pack(const PackArgs&, Team&);
void unpack(const UnpackArgs&, Team&);
void dequantize(const UnpackArgs&, Team&);
void embedding(const EmbeddingArgs&, Team&);
void norm(const NormArgs&, Team&);
void gate(const GateArgs&, Team&);
void kv_append(const KvAppendArgs&, Team&);
void attention(const AttentionArgs&, void* scratch, Team&);
int64_t attention_scratch(const AttentionArgs&, int team);
void attention_dense(const DenseAttentionArgs&, void* scratch, Team&);
int64_t attention_dense_scratch(const DenseAttentionArgs&, int team);
void sample(const SampleArgs&, Team&);
int64_t peak_int8(int64_t steps);
int64_t peak_float32(int64_t steps);

}  // namespace qk::QK_ISA
