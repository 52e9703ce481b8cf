// peak_read: reads a tensor as fast as memory gives it; the caller takes the time.
#include "peak.cuh"

#include "device.h"

namespace qk {
namespace {

// bytes [n] uint8, n a multiple of 16 -> [blocks] int32, whose xor is that of all words of `bytes`
Tensor peak_read(const Tensor& bytes) {
  constexpr const char* op = "peak_read";
  expect(op, "bytes", bytes, ScalarType::Byte, {-1});
  check(bytes.size(0) % 16 == 0, op, "bytes must be a multiple of 16, got ", shape_of(bytes));
  PeakReadArgs args{};
  args.bytes = data<uint8_t>(bytes);
  args.pieces = bytes.size(0) / 16;
  check(reinterpret_cast<uintptr_t>(args.bytes) % 16 == 0, op,
        "bytes must lie at a multiple of 16");
  Tensor seen;
  launch_on(op, bytes, [&](cudaStream_t stream) {
    DeviceLimits limits{};
    if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return error;
    const int64_t blocks = peak_read_blocks(limits);
    seen = empty_on(bytes, {blocks}, ScalarType::Int);
    args.seen = mutable_data<uint32_t>(seen);
    return launch_peak_read(args, blocks, stream);
  });
  return seen;
}

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, QK_DEVICE_KEY, m) { m.impl("peak_read", TORCH_BOX(&peak_read)); }

}  // namespace
}  // namespace qk
