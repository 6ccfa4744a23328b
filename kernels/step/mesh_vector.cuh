// What CTAs of the mesh tell each other: 16 bytes that are their own flag.
//
// The lowest bit of a vector's first word is its phase. Every place in the workspace is written an even number of times in
// a step, with phases 1 and 0 in turn, so a reader knows what it waits for, a launch leaves what it has found (phase 0), and
// nothing is ever cleared. The 16 bytes are one access of the memory model (.b128), so a vector that has the phase is whole.
//
// Nor does a place need a second one, since whoever writes it has heard that all have read it. Of a row, sums of `down`
// follow gated values of the whole group, these all of x, and x the reading of the sums of `out`. Those follow attention,
// this q, k and v over all columns, and these x, for which the sums of `down` had been read. x of the middle of a layer
// follows sums of `out` of all groups, whose warps had read x before; x of the end sums of `down`, these gated values of all
// blocks, and these all of x. The others are written once a layer, after x that follows what their readers sent. x begins a
// layer as often as it is in the middle of one; x before the head has a place of its own, which the begin of the step
// writes, too.
//
// Columns: a lane of wgmma has, of each 32 columns, {0, 1, 8, 9, 16, 17, 24, 25} + 2 (lane % 4), be it of a sum or
// of operand A. So of each 32 columns the 8 of a lane are a vector of T: a row is groups of 32 columns, a group 4 vectors.
// Partial sums, too, are rounded to T: an exchange takes as long as it has lines, and in fp32 they had half of all lines.
//
// Places: a warp reads whole lines. 4 lanes read 64 bytes, 8 rows or sources of a warp 512 that lie in a row. As many half
// lines instead made a step of 40 rows 5 % longer.
#pragma once

#include "kernels/step/mesh_parts.cuh"

namespace vivace::mesh {

/// Phases of what is written: sums of `out` and `down`; x at a layer's begin, in its middle, and before the head; else by
/// layer.
inline constexpr uint32_t kOutPhase = 1, kDownPhase = 0, kFirstPhase = 1, kMiddlePhase = 0, kHeadPhase = 0;
__device__ __forceinline__ uint32_t phase_of(int layer) { return (layer + 1) & 1; }

/// Of rows of `groups` groups in T: where a row's 64 bytes of a group are. Rows r, r + 4, ... r + 28 of it lie side by side:
/// those that a warp reads at a time (see mesh_products.cuh).
__device__ __forceinline__ int place_of(int row, int group, int groups) {
  return ((row % 4 + row / 32 * 4) * groups + group) * 512 + row / 4 % 8 * 64;
}
/// From a group to the next, and from a row to the one 32 further on.
inline constexpr int kGroupPitch = 512;
__device__ __forceinline__ constexpr int second_pitch(int groups) { return 4 * groups * kGroupPitch; }

/// The column, of 32, of value i (0 ... 7) of lane `lane`.
__device__ __forceinline__ int column_of(int lane, int i) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }

/// An fp32 value whose lowest bit is the phase.
__device__ __forceinline__ uint32_t with_phase(float x, uint32_t phase) { return (__float_as_uint(x) & ~1u) | phase; }

/// Eight values as T. The first is rounded to the nearest whose lowest bit is the phase.
template <typename T>
__device__ __forceinline__ uint4 vector_of(const float (&x)[8], uint32_t phase) {
  uint4 v = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
  if ((v.x & 1) != phase) {
    const bool up = (v.x & 0x7fff) == 0 || fabsf(x[0]) >= fabsf(unpack2<T>(v.x).x);
    v.x +=
        up ? 1 : -1;  // to the neighbour on the side of x; NaNs stay NaNs, infinity becomes one, and zero the least of all
  }
  return v;
}

/// Waits until the vectors that the lanes of a warp look at have the phase.
template <typename... P>
__device__ __forceinline__ void poll(uint32_t phase, const P*... vectors) {
  uint32_t wrong;
  step::Watchdog<kTurns> watchdog;
  do {
    watchdog.check();
    wrong = ((step::load_b128(vectors).x ^ phase) | ...);
  } while (__any_sync(~0u, wrong & 1));
}

/// Partial sums of several senders: of each, the lane's 8 of 32 columns.
template <typename T, int kSenders>
struct Parts {
  uint4 v[kSenders];

  /// None is there yet.
  __device__ __forceinline__ explicit Parts(uint32_t phase) {
#pragma unroll
    for (int s = 0; s < kSenders; ++s) v[s] = make_uint4(phase ^ 1, 0, 0, 0);
  }
  /// Asks for what is not there: to ask for all of it again and again holds up others. `pitch` bytes lie between two
  /// senders' sums.
  __device__ __forceinline__ void load(const uint8_t* from, int pitch, uint32_t phase) {
#pragma unroll
    for (int s = 0; s < kSenders; ++s) {
      if ((v[s].x ^ phase) & 1) v[s] = step::load_b128(from + s * pitch);
    }
  }
  /// Whose lowest bit says that one of them does not have the phase.
  __device__ __forceinline__ uint32_t wrong(uint32_t phase) const {
    uint32_t wrong = 0;
#pragma unroll
    for (int s = 0; s < kSenders; ++s) wrong |= v[s].x ^ phase;
    return wrong;
  }
  /// Adds them up in the order of their senders.
  __device__ __forceinline__ void add_up(float (&x)[8]) const {
#pragma unroll
    for (int s = 0; s < kSenders; ++s) {
      float part[8];
      unpack_vector<T>(v[s], part);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = s == 0 ? part[i] : x[i] + part[i];
    }
  }
};

}  // namespace vivace::mesh
