// What the mesh step's tiles of the head leave over: T3's 8194 speech ids are two more than 128 CTAs' tiles, and a tile for
// two would take as long as one for 64.
#pragma once

#include "kernels/step/mesh_residual.cuh"

namespace vivace::mesh {

/// By the warps beside the one that streams, a row and a feature at a time; `warp` counts them.
template <typename T>
__device__ __forceinline__ void multiply_rest(const Cta& c, int warp, int lane) {
  const StepParams& p = c.args.p;
  const int rest = c.rest();
  if (rest == 0) return;
  const T* head = static_cast<const T*>(p.head) + (p.vocab - rest) * kHidden;  // (rest, hidden)
  ptx::prefetch_l2(head + c.cta % rest * kHidden + lane * (kHidden / 32));
  sm90::named_barrier_sync(kLast, kConsumers + kBeside);
#pragma unroll 1
  for (int i = c.cta + kCtas * warp; i < c.rows * rest; i += kCtas * (kBeside / 32)) {
    const int row = i / rest, feature = i % rest;
    const uint8_t* x = c.at<uint8_t>(Layout::x) + Layout::head_x + place_of(row, lane / 4, kHidden / 32) + lane % 4 * 16;
    uint4 squares, v[kHidden / 256];
    uint32_t wrong;
    step::Watchdog<kTurns> watchdog;
    do {
      watchdog.check();
      squares = step::load_b128(squares_of(c, row, lane) + Layout::head_squares);
      wrong = wrong_phase(squares, kHeadPhase);
#pragma unroll
      for (int k = 0; k < kHidden / 256; ++k) v[k] = step::load_b128(x + 8 * k * kGroupPitch);
#pragma unroll
      for (int k = 0; k < kHidden / 256; ++k) wrong |= v[k].x ^ kHeadPhase;
    } while (__any_sync(~0u, wrong & 1));
    const T* weights = head + feature * kHidden + lane / 4 * 32;
    float sum = 0.0f;
#pragma unroll
    for (int column = 0; column < kHidden; column += 256) {
      float a[8];
      unpack_vector<T>(v[column / 256], a);
#pragma unroll
      for (int k = 0; k < 8; k += 2) {
        const float2 w = pair_of(weights + column + column_of(lane, k));
        sum += a[k] * w.x + a[k + 1] * w.y;
      }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    const float inverse = inverse_rms(squares, p.eps);
    if (lane == 0) p.logits[row * p.vocab + (p.vocab - rest) + feature] = sum * inverse;
  }
}

}  // namespace vivace::mesh
