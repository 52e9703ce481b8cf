// What the scores of a row take beyond scale * q . k: ScoreBias of args.h, but for the sinks, which
// are where a row's softmax starts (attention.cpp).
#pragma once
#include "simd.h"

namespace qk::QK_ISA {
namespace {

struct RowBias {
  int64_t position;          // of the query
  float slope;               // 0: none
  const float* by_distance;  // the entry of distance 0 of [-reach, reach], or null
};

// The entries of W distances from `distance` on. Most vectors lie within the table or beyond one of
// its ends; those across an end are put together lane by lane.
QK_INLINE VF entries(const float* by_distance, int64_t reach, int64_t distance) {
  const int64_t last = distance + W - 1;
  if (distance >= -reach && last <= reach) return load(by_distance + distance);
  if (last <= -reach) return splat(by_distance[-reach]);
  if (distance >= reach) return splat(by_distance[reach]);
  float lanes[W];
  for (int64_t i = 0; i < W; i++) {
    const int64_t d = distance + i;
    lanes[i] = by_distance[d < -reach ? -reach : d > reach ? reach : d];
  }
  return load(lanes);
}

// Scores of W keys, the first of which stands at `key`.
QK_INLINE VF add_bias(VF x, const RowBias& b, int64_t reach, int64_t key, VI lane) {
  const int64_t distance = key - b.position;
  x = fma(splat(-b.slope), vabs(to_float(lane + int32_t(distance))), x);
  if (b.by_distance) x += entries(b.by_distance, reach, distance);
  return x;
}

}  // namespace
}  // namespace qk::QK_ISA
