// Building blocks of the persistent step: stages, packets, inputs and sums. Written for few instructions: a layer's code
// runs once a layer in every warp, so fetching and issuing it is what a phase costs beyond latency.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/step/persistent.h"
#include "kernels/step/persistent_ptx.cuh"

namespace vivace::step {

using bf16 = __nv_bfloat16;

/// The ring of stages between the producer and the consumers, as one side sees it.
template <typename S>
struct Ring {
  uint8_t* data;    // (S::stages, S::stage_bytes)
  uint64_t* full;   // (S::stages): bytes have landed
  uint64_t* empty;  // (S::stages): all consumer warps have read them
  int slot = 0;     // of the next stage
  uint32_t parity = 0;

  /// The i-th stage from here.
  __device__ __forceinline__ int at(int i) const { return slot + i < S::stages ? slot + i : slot + i - S::stages; }
  __device__ __forceinline__ uint32_t parity_of(int i) const { return parity ^ (slot + i < S::stages ? 0 : 1); }
  __device__ __forceinline__ uint8_t* stage(int i) const { return data + at(i) * S::stage_bytes; }
  __device__ __forceinline__ uint32_t address(int i) const {
    return ptx::shared_address(data) + static_cast<uint32_t>(at(i) * S::stage_bytes);
  }
  __device__ __forceinline__ void advance(int n) {
    parity = parity_of(n);
    slot = at(n);
  }

  __device__ __forceinline__ void wait_full(int i) const { barrier_wait(full + at(i), parity_of(i)); }
  /// The next kCount stages: the last ones, since the producer asks for a stage when the one in_flight before has landed.
  template <int kCount>
  __device__ __forceinline__ void wait_full() const {
    constexpr int kFirst = kCount > S::in_flight ? kCount - S::in_flight : 0;
    bool landed = true;
#pragma unroll
    for (int i = kFirst; i < kCount; ++i) landed = barrier_try_wait(full + at(i), parity_of(i)) && landed;
    if (!__all_sync(0xffffffffu, landed)) {
#pragma unroll 1
      for (int i = kFirst; i < kCount; ++i) wait_full(i);
    }
    __syncwarp();
  }
  /// The first `count` of kCount, which the warp agrees on.
  template <int kCount>
  __device__ __forceinline__ void wait_full_some(int count) const {
    bool landed = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count && i >= count - S::in_flight) landed = barrier_try_wait(full + at(i), parity_of(i)) && landed;
    }
    if (!__all_sync(0xffffffffu, landed)) {
#pragma unroll 1
      for (int i = max(0, count - S::in_flight); i < count; ++i) wait_full(i);
    }
    __syncwarp();
  }
  /// Returns the next kCount stages to the producer. `nothing` is 0, but computed from all that this lane has loaded from
  /// them: the arrival does not pass a load that is still under way, which the copy engine would overtake.
  template <int kCount>
  __device__ __forceinline__ void release(int lane, uint32_t nothing) {
    __syncwarp();
    if (lane < kCount) sm90::barrier_arrive(empty + at(lane) + nothing);
    advance(kCount);
  }
  __device__ __forceinline__ void release_some(int lane, int count, uint32_t nothing) {
    __syncwarp();
    if (lane < count) sm90::barrier_arrive(empty + at(lane) + nothing);
    advance(count);
  }
};

/// Operands A of `mma`, 16 x 16 each, of 8 outputs x 16 inputs from `upper` on and of 8 x 16 from `lower` on, and of the
/// kSteps - 1 steps of 16 inputs that follow; both addresses of the first 64 inputs, in shared memory. They come as ldmatrix
/// leaves them: to move them to where `mma` wants them would cost more than `mma`. Returns bits of all of them.
template <int kSteps>
__device__ __forceinline__ uint32_t load_weights(uint32_t upper, uint32_t lower, int lane, uint32_t (&w)[kSteps][4]) {
  const uint32_t row = lane % 8;
  const uint32_t first = (lane / 8 % 2 == 0 ? upper : lower) + row * 128 + ((lane / 16) ^ row) * 16;
  uint32_t bits = 0;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    ptx::ldmatrix_x4(w[s], (first ^ (s % 4 * 32)) + s / 4 * 1024);
    bits |= w[s][0];
  }
  return bits;
}

/// Where word i (inputs 2 * i and 2 * i + 1) lies in staging: the words of a lane for two mma are neighbours.
__device__ __forceinline__ int staged(int i) { return (i & ~15) + (i % 4) * 4 + i % 16 / 4; }

/// Where a lane finds its inputs in staging: of its column of B, those of a row, or with kPaired from the columns after
/// the rows' on the same rows' again, `behind` words further. Columns after those repeat them; nobody reads their products.
template <typename S, bool kPaired>
__device__ __forceinline__ const uint32_t* staged_inputs(const uint32_t* staging, int row_words, int behind, int lane) {
  const int column = lane / 4;
  return staging + column % S::rows * row_words + (kPaired ? column / S::rows % 2 * behind : 0) + lane % 4 * 4;
}
/// Inputs 32 * i ... 32 * i + 31, for two mma: (x, y) and (z, w).
__device__ __forceinline__ uint4 load_inputs(const uint32_t* inputs, int i) {
  return *reinterpret_cast<const uint4*>(inputs + i * 16);
}

/// The sum of a product's upper half, of the rows' columns, and its lower half, of as many columns after those.
template <typename S>
__device__ __forceinline__ void fold(float (&d)[4]) {
  if constexpr (S::rows == 1) {
    d[0] += d[3];
  } else {
    d[0] += __shfl_xor_sync(0xffffffffu, d[2], S::rows / 2);
    d[1] += __shfl_xor_sync(0xffffffffu, d[3], S::rows / 2);
  }
}

/// Writes this warp's share of outputs `first` + {0 ... 7} (and + 8 with kBoth) to sums (warps, rows, kStride).
template <typename S, int kStride, bool kBoth>
__device__ __forceinline__ void store_sums(float* sums, int warp, int lane, int first, const float (&d)[4]) {
  const int row = 2 * (lane % 4);
  float* to = sums + (warp * S::rows + row) * kStride + first + lane / 4;
  if (row < S::rows) {
    to[0] = d[0];
    if (kBoth) to[8] = d[2];
    if (S::rows > 1) {
      to[kStride] = d[1];
      if (kBoth) to[kStride + 8] = d[3];
    }
  }
}

/// The sum of one value over all warps, always in the same order.
template <typename S, int kStride>
__device__ __forceinline__ float sum_over_warps(const float* values) {
  float v[S::warps];
#pragma unroll
  for (int w = 0; w < S::warps; ++w) v[w] = values[w * S::rows * kStride];
#pragma unroll
  for (int n = S::warps / 2; n > 0; n /= 2) {
#pragma unroll
    for (int w = 0; w < n; ++w) v[w] += v[w + n];
  }
  return v[0];
}

/// The same of two neighbouring values.
template <typename S, int kStride>
__device__ __forceinline__ float2 pair_over_warps(const float* values) {
  float2 v[S::warps];
#pragma unroll
  for (int w = 0; w < S::warps; ++w) v[w] = *reinterpret_cast<const float2*>(values + w * S::rows * kStride);
#pragma unroll
  for (int n = S::warps / 2; n > 0; n /= 2) {
#pragma unroll
    for (int w = 0; w < n; ++w) {
      v[w].x += v[w + n].x;
      v[w].y += v[w + n].y;
    }
  }
  return v[0];
}

__device__ __forceinline__ uint32_t tag_of(const uint4& v) { return v.w; }
__device__ __forceinline__ uint32_t tag_of(const uint2& v) { return v.y; }

/// Asks for the packets that `receive` will wait for.
template <int kN, typename Packet, typename At, typename Wanted>
__device__ __forceinline__ void ask(Packet (&v)[kN], const Packet* from, At at, Wanted wanted) {
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    v[j] = Packet{};
    if (wanted(j)) v[j] = load_packet(from + at(j));
  }
}
/// Waits for the packets from[at(j)], j < kN, with `tag`, in the lanes and for the j that `wanted` says. The lanes of a warp
/// leave together: what follows would cost a warp that has diverged several times as much.
template <int kN, typename Packet, typename At, typename Wanted>
__device__ __forceinline__ void receive(Packet (&v)[kN], const Packet* from, uint32_t tag, At at, Wanted wanted) {
  asm volatile("" : "+l"(from));  // computed once, and before
  ask(v, from, at, wanted);
  Watchdog<kMaxTurns> watchdog;
  for (;;) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < kN; ++j) all = all && (!wanted(j) || tag_of(v[j]) == tag);
    if (__all_sync(0xffffffffu, all)) break;
    watchdog.check();
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (wanted(j) && tag_of(v[j]) != tag) v[j] = load_packet(from + at(j));
    }
  }
}

}  // namespace vivace::step
