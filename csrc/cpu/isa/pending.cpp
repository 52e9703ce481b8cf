// Placeholders while kernels are being written; deleted when the last one is there.
#include "isa.h"
#include <cstdio>
#include <cstdlib>
#define PENDING(name, ...) __attribute__((weak)) void name(__VA_ARGS__) { std::fprintf(stderr, "%s is not written yet\n", #name); std::abort(); }
namespace qk::QK_ISA {
PENDING(linear, const LinearArgs&, void*, Team&)
__attribute__((weak)) int64_t linear_scratch(const LinearArgs&, int) { return 0; }
PENDING(quantize_act, const QuantizeActArgs&, Team&)
PENDING(pack, const PackArgs&, Team&)
PENDING(unpack, const UnpackArgs&, Team&)
PENDING(dequantize, const UnpackArgs&, Team&)
PENDING(embedding, const EmbeddingArgs&, Team&)
PENDING(norm, const NormArgs&, Team&)
PENDING(gate, const GateArgs&, Team&)
PENDING(kv_append, const KvAppendArgs&, Team&)
PENDING(attention, const AttentionArgs&, void*, Team&)
__attribute__((weak)) int64_t attention_scratch(const AttentionArgs&, int) { return 0; }
PENDING(attention_dense, const DenseAttentionArgs&, void*, Team&)
__attribute__((weak)) int64_t attention_dense_scratch(const DenseAttentionArgs&, int) { return 0; }
PENDING(sample, const SampleArgs&, Team&)
}
