// Alignment probes of the persistent step: attention probabilities of single heads.
#pragma once

#include "kernels/step/persistent_keys.cuh"
#include "kernels/step/step_probe.cuh"

namespace vivace::step {

/// The warps beside the producer: zeros where a row has no key, and when all scores are there, as powers of two, and the
/// heads' log-sum-exp, the probabilities of this CTA's keys. The consumers never wait for this.
template <int kHeads, int kRows>
__device__ __forceinline__ void finish_probes(const StepParams& p, uint64_t* attended, const float* probe_lse, int thread) {
  using S = PersistentShape<kHeads, kRows>;
  constexpr int kThreads = S::threads - 32 * (S::warps + 1);
  const int cta = static_cast<int>(blockIdx.x), head = cta / S::group, part = cta % S::group;
  const int rows = static_cast<int>(p.rows), count = static_cast<int>(p.probe_count);
  ptx::grid_dependency_wait();
  for (int row = 0; row < rows; ++row) {
    const int64_t first = cache_row(p, row).length + 1;
    for (int i = 0; i < count; ++i) {
      float* to = probe_row(p, i, row);
      for (int64_t key = first + cta * kThreads + thread; key < p.probe_capacity; key += S::ctas * kThreads) to[key] = 0.0f;
    }
  }
  barrier_wait(attended, 0);
  for (int i = 0; i < count; ++i) {
    const int layer = p.probe_layer[i];
    if (p.probe_head[i] != head || find_probe(p, layer, head) != i) continue;
    for (int row = 0; row < rows; ++row) {
      const KeyRange range = key_range<S>(layer, row, part, cache_row(p, row).length);
      if (range.part < 0) continue;
      const int end = min(range.end + (range.last ? 1 : 0), static_cast<int>(p.probe_capacity));
      const float* from = probe_row(p, i, row);
      const float lse = probe_lse[i * kRows + row];
      for (int key = range.first + thread; key < end; key += kThreads) {
        const float probability = ptx::exp2_approx(from[key] - lse);
        for (int same = i; same < count; ++same) {
          if (p.probe_layer[same] == layer && p.probe_head[same] == head) probe_row(p, same, row)[key] = probability;
        }
      }
    }
  }
}

}  // namespace vivace::step
