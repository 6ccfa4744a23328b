// State of a consumer warp of the persistent step.
#pragma once

#include "kernels/step/persistent_parts.cuh"

namespace vivace::step {

/// One consumer warp: what it knows, and what it shares with the others of its CTA.
template <int kHeads, int kRows>
struct Worker {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  static constexpr int kThreads = 32 * S::warps;
  static constexpr int kWarpRows = (kRows + S::warps - 1) / S::warps;  // rows that a warp finishes, where a warp takes a row

  const StepParams& p;
  const float* probes;  // p.probes; null is known to the kernel for steps without
  uint32_t zero;
  Ring<S> ring;
  uint32_t* staging;  // this warp's, (rows, 64) words; (rows, gated_words) for down
  float *sums_a, *sums_b, *sums_c;
  float* probe_lse;  // (probes, rows)
  float* residuals;  // (rows, 8), of outputs 8 * cta ...: in shared memory, as the registers are needed for weights
  float* rotary;     // (rows, 8): cosines and sines of this CTA's four rotary pairs
  const int warp, lane = static_cast<int>(threadIdx.x) % 32;
  const int cta = __shfl_sync(0xffffffffu, static_cast<int>(blockIdx.x), 0);  // not read again and again
  const int head = cta / S::group, part = cta % S::group;
  const int rows = kRows <= 2 ? kRows : static_cast<int>(p.rows);  // a kernel of up to 2 rows has as many
  uint32_t tag = 0;
  int lengths[kRows];    // old keys of each row
  float squares[kRows];  // a lane's part of the sums of squares of the inputs

  template <typename Packet>
  __device__ __forceinline__ Packet* mailbox(size_t offset) const {
    return reinterpret_cast<Packet*>(static_cast<uint8_t*>(p.workspace) + offset);
  }
  __device__ __forceinline__ void synchronize() const {
    __syncwarp();
    sm90::named_barrier_sync(1, kThreads);
  }
  /// The next kStages stages to registers, as `load` does it, and the stages back to the producer.
  template <int kStages, typename Load>
  __device__ __forceinline__ void fetch(const Load& load) {
    ring.template wait_full<kStages>();
    ring.template release<kStages>(lane, load() & zero);
  }
  __device__ __forceinline__ int length_of(int row) const {
    int length = lengths[0];
#pragma unroll
    for (int r = 1; r < kRows; ++r) length = r == row ? lengths[r] : length;
    return length;
  }
};

}  // namespace vivace::step
