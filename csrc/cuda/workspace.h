// Memory that launches need beside their arguments.
//
// Scratch is a tensor of the call: torch's allocator knows streams and captured graphs. Counters
// (launchers.h) must be zero before a launch and are zero after it, so they last: two launches may
// share them when one comes after the other. They lie in arrays of the library, which each device
// has from the start and which therefore need no allocation, at a moment when a graph may be
// capturing:
//
// - an eager launch has those of its (device, stream), which runs one launch after another;
// - a captured launch has counters to itself, for good: a graph may be replayed on any stream,
//   beside others and beside eager launches. (A graph runs beside itself only if it is instantiated
//   twice, and these must not be replayed at the same time.)
//
// When either are used up, a launch gets memory of its own, and clears it: correct, but one more
// node in the graph or operation in the stream.
#pragma once
#include "device.h"
#include "launchers.h"

namespace qk {

class Workspace {
 public:
  // For one launch; lives until it is on its stream.
  Workspace(const char* op, const Tensor& like, cudaStream_t stream)
      : op_(op), like_(like), stream_(stream) {}

  // 256-byte aligned, of which kernels write what they read. Null for no bytes. Called once.
  void* scratch(int64_t bytes);
  // `count` zeros, at most kLinearCounters.
  cudaError_t counters(int64_t count, uint32_t** out);

 private:
  const char* op_;
  const Tensor& like_;
  cudaStream_t stream_;
  std::optional<Tensor> scratch_, counters_;
};

}  // namespace qk
