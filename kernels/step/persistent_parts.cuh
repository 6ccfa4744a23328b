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
  __device__ __forceinline__ void advance(int n) {
    parity = parity_of(n);
    slot = at(n);
  }

  __device__ __forceinline__ void wait_full(int i) const { barrier_wait(full + at(i), parity_of(i)); }
  template <int kCount>
  __device__ __forceinline__ void wait_full() const {
    bool landed = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) landed = barrier_try_wait(full + at(i), parity_of(i)) && landed;
    if (!__all_sync(0xffffffffu, landed)) {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i) wait_full(i);
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
};

/// Fragments of kTiles x 8 outputs x kWords / 8 blocks of 64 inputs; w[i][8 * b + j] holds inputs 64 * b + 8 * j + 2 * (lane
/// % 4) + {0, 1} of output lane / 4 of tile i. The tiles are the stages from `first` on, `block` the first block of this
/// warp. Returns bits of all of them.
template <typename S, int kTiles, int kWords>
__device__ __forceinline__ uint32_t load_weights(const Ring<S>& ring, int first, int block, int lane,
                                                 uint32_t (&w)[kTiles][kWords]) {
  const int row = lane % 8, column = lane / 8;  // the row of 128 bytes, the 16 bytes of it that this lane addresses
  const uint32_t base = ptx::shared_address(ring.data) + block * 1024 + row * 128;
  const uint32_t lo = base + ((column ^ row) * 16), hi = base + (((column + 4) ^ row) * 16);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const uint32_t stage = ring.at(first + i) * S::stage_bytes;
#pragma unroll
    for (int b = 0; b < kWords / 8; ++b) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, lo + stage + b * 1024);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[i][8 * b + j] = r[j];
      ptx::ldmatrix_x4(r, hi + stage + b * 1024);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[i][8 * b + 4 + j] = r[j];
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kWords; j += 4) bits |= w[i][j];
  }
  return bits;
}

/// Where word i (inputs 2 * i and 2 * i + 1) lies in staging: the words of a lane for two mma are neighbours.
__device__ __forceinline__ int staged(int i) { return (i & ~15) + (i % 4) * 4 + i % 16 / 4; }

/// Inputs 32 * i ... 32 * i + 31 of this lane's row, for two mma: (x, y) and (z, w).
template <typename S>
__device__ __forceinline__ uint4 load_inputs(const uint32_t* staging, int row_words, int i, int lane) {
  if (lane / 4 >= S::rows) return make_uint4(0, 0, 0, 0);
  return *reinterpret_cast<const uint4*>(staging + (lane / 4) * row_words + i * 16 + (lane % 4) * 4);
}

/// d (16 outputs x 8 rows) += 16 inputs, those of step s of a tile's fragments; of two tiles, or of one and nothing.
template <int kWords>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&lo)[kWords], const uint32_t (&hi)[kWords], int s,
                                         uint32_t x0, uint32_t x1) {
  const uint32_t a[4] = {lo[2 * s], hi[2 * s], lo[2 * s + 1], hi[2 * s + 1]};
  ptx::mma_m16n8k16<bf16>(d, a, x0, x1);
}
template <int kWords>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&w)[kWords], int s, uint32_t x0, uint32_t x1) {
  const uint32_t a[4] = {w[2 * s], 0, w[2 * s + 1], 0};
  ptx::mma_m16n8k16<bf16>(d, a, x0, x1);
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
  ask(v, from, at, wanted);
  Watchdog watchdog;
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
