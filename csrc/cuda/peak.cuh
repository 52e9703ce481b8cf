// What memory gives at best: a kernel that reads and does nothing else, for the ceilings of
// benchmarks. It xors what it reads, so that the compiler cannot leave a load out and a test can
// tell whether each byte was read once.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace qk {

constexpr int kPeakThreads = 512;
// Loads of 16 bytes per thread before it uses the first; ptxas keeps to 32 registers, so that fewer
// are on their way at once. With 2048 threads on a multiprocessor one each is 32 KB, and 4.8 TB/s
// at a latency of 1 us ask 132 multiprocessors for 36 KB each.
constexpr int kPeakLoads = 8;

struct PeakReadArgs {
  const uint8_t* bytes;  // [16 * pieces], 16-byte aligned
  int64_t pieces;
  uint32_t* seen;  // [blocks]: the words that a block has read, xor each other
};

// Blocks take runs of kPeakThreads * kPeakLoads pieces in turns.
__global__ void __launch_bounds__(kPeakThreads) peak_read_kernel(const PeakReadArgs args) {
  auto* partial = shared_memory<uint32_t>();  // [kPeakThreads / 32]
  constexpr int64_t run = kPeakThreads * kPeakLoads;
  uint32_t seen = 0;
  for (int64_t first = blockIdx.x * run; first < args.pieces; first += gridDim.x * run) {
    Words4 raw[kPeakLoads];
#pragma unroll
    for (int i = 0; i < kPeakLoads; i++) {
      const int64_t piece = first + i * kPeakThreads + threadIdx.x;
      raw[i] = piece < args.pieces ? load_stream(args.bytes + 16 * piece) : Words4{};
    }
#pragma unroll
    for (int i = 0; i < kPeakLoads; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) seen ^= raw[i].word[j];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) seen ^= shuffle_xor(seen, mask);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = seen;
  block_sync();
  if (threadIdx.x != 0) return;
  seen = 0;
  for (int w = 0; w < kPeakThreads / 32; w++) seen ^= partial[w];
  args.seen[blockIdx.x] = seen;
}

// As many blocks as run at a time: 2048 threads on a multiprocessor.
inline int64_t peak_read_blocks(const DeviceLimits& limits) {
  return int64_t(limits.multiprocessors) * (2048 / kPeakThreads);
}

inline cudaError_t launch_peak_read(const PeakReadArgs& args, int64_t blocks, cudaStream_t stream) {
  return launch(peak_read_kernel, dim3(unsigned(blocks)), dim3(kPeakThreads),
                kPeakThreads / 32 * sizeof(uint32_t), stream, args);
}

}  // namespace qk
