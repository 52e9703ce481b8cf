#include "attention_prefill.cuh"

namespace qk {

cudaError_t launch_attention_prefill_f16(const AttentionTask& task, cudaStream_t stream) {
  return launch_attention_prefill_pages<half_t, false>(task, stream);
}

}  // namespace qk
