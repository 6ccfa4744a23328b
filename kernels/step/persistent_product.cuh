// Products of the persistent step: a warp's share of the inputs, for all outputs of its CTA.
#pragma once

#include "kernels/step/persistent_worker.cuh"

namespace vivace::step {

template <int kHeads, int kRows>
__device__ __forceinline__ void multiply_qkv(const Worker<kHeads, kRows>& self, const uint32_t (&w)[3][16]) {
  const int lane = self.lane;
  using S = PersistentShape<kHeads, kRows>;
  float qk[2][4] = {}, v[2][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = load_inputs<S>(self.staging, 64, i, lane);
    multiply(qk[0], w[0], w[1], 2 * i, x.x, x.y);
    multiply(v[0], w[2], 2 * i, x.x, x.y);
    multiply(qk[1], w[0], w[1], 2 * i + 1, x.z, x.w);
    multiply(v[1], w[2], 2 * i + 1, x.z, x.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    qk[0][i] += qk[1][i];
    v[0][i] += v[1][i];
  }
  store_sums<S, S::row_a, true>(self.sums_a, self.warp, lane, 0, qk[0]);
  store_sums<S, S::row_a, false>(self.sums_a, self.warp, lane, 16, v[0]);
}

template <int kHeads, int kRows>
__device__ __forceinline__ void multiply_out(const Worker<kHeads, kRows>& self, const uint32_t (&w)[1][16]) {
  const int lane = self.lane;
  using S = PersistentShape<kHeads, kRows>;
  float d[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = load_inputs<S>(self.staging, 64, i, lane);
    multiply(d[i], w[0], 2 * i, x.x, x.y);
    multiply(d[i], w[0], 2 * i + 1, x.z, x.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
  store_sums<S, S::row_a, false>(self.sums_a, self.warp, lane, 0, d[0]);
}

/// Outputs of eight tiles to sums_b (warps, rows, 64).
template <int kHeads, int kRows>
__device__ __forceinline__ void multiply_eight(const Worker<kHeads, kRows>& self, const uint32_t (&w)[8][16]) {
  const int lane = self.lane;
  using S = PersistentShape<kHeads, kRows>;
  float d[4][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = load_inputs<S>(self.staging, 64, i, lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) multiply(d[n], w[2 * n], w[2 * n + 1], 2 * i, x.x, x.y);
#pragma unroll
    for (int n = 0; n < 4; ++n) multiply(d[n], w[2 * n], w[2 * n + 1], 2 * i + 1, x.z, x.w);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) store_sums<S, S::row_b, true>(self.sums_b, self.warp, lane, 16 * n, d[n]);
}

template <int kHeads, int kRows>
__device__ __forceinline__ void store_down(const Worker<kHeads, kRows>& self, float (&d)[4][4]) {
  const int lane = self.lane;
  using S = PersistentShape<kHeads, kRows>;
#pragma unroll
  for (int i = 0; i < 4; ++i) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
  store_sums<S, S::row_c, false>(self.sums_c, self.warp, lane, 0, d[0]);
}

/// The inputs' sums of squares, of this warp's share; after the product, which does not wait for them.
template <int kStride, int kHeads, int kRows>
__device__ __forceinline__ void store_squares(const Worker<kHeads, kRows>& self, float* sums) {
  const int lane = self.lane;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float square = self.squares[r];
#pragma unroll
    for (int m = 2; m < 32; m *= 2) square += __shfl_xor_sync(0xffffffffu, square, m);
    if (lane == 0) sums[(self.warp * kRows + r) * kStride + kStride - 1] = square;
  }
}

}  // namespace vivace::step
