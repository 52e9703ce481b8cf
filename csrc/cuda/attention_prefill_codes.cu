#include "attention_prefill.cuh"

namespace qk {

cudaError_t launch_attention_prefill_codes(const AttentionTask& task, cudaStream_t stream) {
  return launch_attention_prefill_pages<half_t, true>(task, stream);
}

}  // namespace qk
