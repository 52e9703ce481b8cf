// The kernels of one instruction set, as a table. Each file of isa/ is compiled once per set;
// isa/table.cpp fills it.
#pragma once
#include "../args.h"
#include "team.h"

namespace qk {

// Every thread of the team calls the kernel with the same arguments. `scratch` members are listed
// by the kernel's
// *_scratch function: bytes that the caller allocates once, shared by the team.
struct Kernels {
  const char* name;  // "scalar", "avx2", "avx512"
  void (*linear)(const LinearArgs&, void* scratch, Team&);
  int64_t (*linear_scratch)(const LinearArgs&, int team);
  void (*quantize_act)(const QuantizeActArgs&, Team&);
  void (*pack)(const PackArgs&, Team&);
  void (*unpack)(const UnpackArgs&, Team&);
  void (*dequantize)(const UnpackArgs&, Team&);
  void (*embedding)(const EmbeddingArgs&, Team&);
  void (*norm)(const NormArgs&, Team&);
  void (*gate)(const GateArgs&, Team&);
  void (*kv_append)(const KvAppendArgs&, Team&);
  void (*attention)(const AttentionArgs&, void* scratch, Team&);
  int64_t (*attention_scratch)(const AttentionArgs&, int team);
  void (*attention_dense)(const DenseAttentionArgs&, void* scratch, Team&);
  int64_t (*attention_dense_scratch)(const DenseAttentionArgs&, int team);
  void (*sample)(const SampleArgs&, Team&);
  // Operations that the calling thread did in `steps` rounds of a loop on registers alone.
  int64_t (*peak_int8)(int64_t steps);
  int64_t (*peak_float32)(int64_t steps);
};

namespace scalar {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

// The table in use: the best set that this CPU has, or the one that QKERNELS_CPU_ISA or set_cpu_isa
// names.
const Kernels& kernels();

}  // namespace qk
