// kv_append on CUDA; its checks are in kv_append_ops.h, the kernel in kv_append.cuh.
#include "kv_append.cuh"

#include "../kv_append_ops.h"
#include "device.h"

namespace qk {

void run_kv_append(const char* op, const Tensor& q, const KvAppendArgs& args) {
  launch_on(op, q, [&](cudaStream_t stream) { return launch_kv_append(args, stream); });
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) {
  m.impl("kv_append", TORCH_BOX((&kv_append<run_kv_append, Contents::unchecked>)));
}

}  // namespace
}  // namespace qk
