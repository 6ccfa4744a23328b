// The whole token step as one kernel: embedding, all layers, final norm, head, for 1 to 4 rows. docs/kernels.md, "The
// persistent token step", has the picture.
//
// 8 CTAs a head, one an SM. In each, one producer warp and a consumer warp for two heads (8 of them for T3).
//
// The producer streams what its CTA reads of every matrix, and its share of the old keys and values, through stages of
// shared memory, in the order of use. It waits for nothing but free stages, so the memory works while the CTAs exchange
// results. A stage is 8 outputs x all inputs of a weight matrix (a quarter of them for down); consumer warp w multiplies
// inputs 128 w ... 128 w + 127, and the warps' shares are summed through shared memory, always in the same order. Weights
// are the A operand of mma.m16n8k16, fetched into registers, and their stages freed, before the inputs are there: when
// those arrive, only products are left.
//
// Results go from CTA to CTA as packets in global memory (L2): payload and a sequence number in one 16-byte store; readers
// poll. A layer has five such hops, and no barrier across the grid:
//   1 q, k, v of a head       to CTAs of the head      each has 8 outputs of each, four rotary pairs
//   2 attention over a part of the row's keys          to all, which merge the parts of all heads
//   3 residual * gain, sums of squares                 to all
//   4 silu(gate) * up                                  to all
//   5 residual * gain, sums of squares                 to all
// The residual itself stays in fp32 with its owner, which has 8 outputs. The norm's 1 / rms is applied to the sums, after
// the product.
//
// A row's keys are split into 2, 4 or 8 parts, by its length; with fewer parts than CTAs of a head, rows and layers take
// turns, so that two rows are attended to by different CTAs and all stream as much.
//
// A mailbox is written again one layer later at the earliest, when every CTA has been heard of since it was read. Sequence
// numbers grow from call to call: nothing is ever reset.
//
// No sum depends on how many rows there are: a row's result is the same bit for bit, alone or among others.
#pragma once

#include "kernels/step/persistent_consume.cuh"
#include "kernels/step/persistent_probe.cuh"
#include "kernels/step/persistent_produce.cuh"

namespace vivace::step {

template <int kHeads, int kRows, bool kProbes>
__global__ void __launch_bounds__(PersistentShape<kHeads, kRows>::threads, 1)
    persistent_kernel(const __grid_constant__ PersistentArgs args) {
  using S = PersistentShape<kHeads, kRows>;
  uint8_t* shared = dynamic_shared();
  Ring<S> ring;
  ring.data = shared;
  ring.full = reinterpret_cast<uint64_t*>(shared + S::stages * S::stage_bytes);
  ring.empty = ring.full + S::stages;
  uint64_t* attended = ring.empty + S::stages;  // all layers' attention is done, for the probes
  uint32_t* staging = reinterpret_cast<uint32_t*>(attended + 2);
  float* sums_b = reinterpret_cast<float*>(staging + S::warps * S::staging_words);
  float* sums_a = sums_b + S::sums_b;
  float* sums_c = sums_a + S::sums_a;
  float* probe_lse = sums_c + S::sums_c;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);  // known to be the same for the warp
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < S::stages) {
    sm90::barrier_init(ring.full + thread, 1);
    sm90::barrier_init(ring.empty + thread, S::warps);
    if (thread == 0) sm90::barrier_init(attended, 32 * S::warps);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  ptx::grid_dependency_launch();
  if (warp >= S::warps) {
    if constexpr (S::warps == 8) sm90::registers_decrease<S::producer_registers>();
    if (static_cast<int>(threadIdx.x) == 32 * S::warps) {
      produce<kHeads, kRows>(args, ring);
    } else if (kProbes && warp > S::warps) {
      finish_probes<kHeads, kRows>(args.p, attended, probe_lse, static_cast<int>(threadIdx.x) - 32 * (S::warps + 1));
    }
  } else {
    if constexpr (S::warps == 8) sm90::registers_increase<S::consumer_registers>();
    Worker<kHeads, kRows> worker{args.p,
                                 kProbes ? args.p.probes : nullptr,
                                 args.zero,
                                 ring,
                                 staging + warp * S::staging_words,
                                 sums_a,
                                 sums_b,
                                 sums_c,
                                 probe_lse,
                                 probe_lse + S::probe_lse,
                                 probe_lse + S::probe_lse + 8 * kRows,
                                 warp};
    consume(worker, attended);
  }
}

}  // namespace vivace::step
