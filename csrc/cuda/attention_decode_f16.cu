#include "attention_decode.cuh"

namespace qk {

cudaError_t launch_attention_decode_f16(const AttentionTask& task, const AttentionParts& parts,
                                        const DecodePlan& plan, cudaStream_t stream) {
  return launch_attention_decode_pages<KvType::f16>(task, parts, plan, stream);
}

}  // namespace qk
