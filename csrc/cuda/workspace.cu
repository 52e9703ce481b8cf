#include "workspace.h"

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace qk {
namespace {

constexpr int kStreams = 32;
constexpr int64_t kCaptured = 1 << 20;  // 20 graphs of a model of 32 layers have some 50,000 each

// Zero when the library is loaded, on every device.
__device__ uint32_t stream_counters[kStreams * kLinearCounters];

#ifndef QK_EMULATE_CUDA
__device__ uint32_t captured_counters[kCaptured];

// Which of the kStreams sets belongs to this stream of this device; kStreams: none is left. Ids of
// streams, unlike handles, are not used again.
int set_of_stream(int device, unsigned long long id) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> sets;
  static std::map<int, int> used;
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = sets.find({device, id});
  if (found != sets.end()) return found->second;
  if (used[device] == kStreams) return kStreams;
  return sets[{device, id}] = used[device]++;
}
// Where `count` of the captured counters begin that nobody has; kCaptured: there are not so many.
int64_t take_captured(int device, int64_t count) {
  constexpr int kDevices = 64;
  static std::atomic<int64_t> taken[kDevices];
  if (device >= kDevices) return kCaptured;
  const int64_t at = taken[device].fetch_add(count);
  return at + count <= kCaptured ? at : kCaptured;
}
#endif

}  // namespace

void* Workspace::scratch(int64_t bytes) {
  if (bytes == 0) return nullptr;
  scratch_ = empty_on(like_, {bytes + 256}, ScalarType::Byte);
  const auto first = reinterpret_cast<intptr_t>(mutable_data(*scratch_));
  return reinterpret_cast<void*>(layout::round_up(first, 256));
}

cudaError_t Workspace::counters(int64_t count, uint32_t** out) {
#ifdef QK_EMULATE_CUDA
  *out = stream_counters;
  emu::allow(stream_counters, count * int64_t(sizeof *stream_counters), emu::Use::write);
  return cudaSuccess;
#else
  cudaStreamCaptureStatus capture{};
  if (cudaError_t error = cudaStreamIsCapturing(stream_, &capture); error != cudaSuccess)
    return error;
  const int device = like_.get_device_index();
  void* base = nullptr;
  int64_t at = -1;
  if (capture != cudaStreamCaptureStatusNone) {
    if (const int64_t i = take_captured(device, count); i < kCaptured) {
      if (cudaError_t error = cudaGetSymbolAddress(&base, captured_counters); error != cudaSuccess)
        return error;
      at = i;
    }
  } else {
    unsigned long long id = 0;
    if (cudaError_t error = cudaStreamGetId(stream_, &id); error != cudaSuccess) return error;
    if (const int set = set_of_stream(device, id); set < kStreams) {
      if (cudaError_t error = cudaGetSymbolAddress(&base, stream_counters); error != cudaSuccess)
        return error;
      at = set * kLinearCounters;
    }
  }
  if (at >= 0) return *out = static_cast<uint32_t*>(base) + at, cudaSuccess;
  counters_ = empty_on(like_, {count}, ScalarType::Int);
  *out = mutable_data<uint32_t>(*counters_);
  return cudaMemsetAsync(*out, 0, size_t(count) * sizeof(uint32_t), stream_);
#endif
}

}  // namespace qk
