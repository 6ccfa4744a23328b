// Where a step writes its alignment probes.
#pragma once

#include "kernels/step/step.h"

namespace vivace::step {

/// The first probe of a layer's head; -1: none. Several of the same one take their scores from the first.
__device__ __forceinline__ int find_probe(const StepParams& p, int layer, int head) {
  int found = -1;
  for (int i = static_cast<int>(p.probe_count) - 1; i >= 0; --i) {
    if (p.probe_layer[i] == layer && p.probe_head[i] == head) found = i;
  }
  return found;
}
__device__ __forceinline__ float* probe_row(const StepParams& p, int probe, int row) {
  return p.probes + (probe * p.probe_rows + row) * p.probe_capacity;
}

}  // namespace vivace::step
