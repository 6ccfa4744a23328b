// Products of the persistent step: a warp's share of the inputs, for all outputs of its CTA.
#pragma once

#include "kernels/step/persistent_worker.cuh"

namespace vivace::step {

/// The sums of squares of this warp's inputs, over its lanes in five steps. Between products: a step waits for the one
/// before.
template <int kHeads, int kRows>
struct Squares {
  float sum[kRows];

  __device__ __forceinline__ explicit Squares(const Worker<kHeads, kRows>& self) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = self.squares[r];
  }
  __device__ __forceinline__ void step(int i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1 << i);
  }
  template <int kStride>
  __device__ __forceinline__ void store(const Worker<kHeads, kRows>& self, float* sums) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (self.lane == 0) sums[(self.warp * kRows + r) * kStride + kStride - 1] = sum[r];
    }
  }
};

/// A matrix's part of a warp: operands A, 16 outputs or twice 8 x 16 inputs each, and their products with the staged inputs.
/// Where a CTA has 8 outputs of a matrix, A holds two parts of the inputs, and B has them in columns of their own.
struct QkvWeights {
  uint32_t qk[8][4], v[4][4];
};
template <int kHeads, int kRows>
__device__ __forceinline__ uint32_t load_weights(const Worker<kHeads, kRows>& self, QkvWeights& w) {
  const uint32_t inputs = 2048 * self.warp;
  return load_weights(self.ring.address(0) + inputs, self.ring.address(1) + inputs, self.lane, w.qk) |
         load_weights(self.ring.address(2) + inputs, self.ring.address(2) + inputs + 1024, self.lane, w.v);
}
template <int kHeads, int kRows>
__device__ __forceinline__ void multiply(const Worker<kHeads, kRows>& self, const QkvWeights& w) {
  using S = PersistentShape<kHeads, kRows>;
  Squares<kHeads, kRows> squares(self);
  float qk[2][4] = {}, v[2][4] = {};
  const uint32_t* inputs = staged_inputs<S, true>(self.staging, 64, 32, self.lane);
  const uint32_t* rest = staged_inputs<S, false>(self.staging, 64, 0, self.lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = load_inputs(i < 2 ? inputs : rest, i);
    ptx::mma_m16n8k16<bf16>(qk[0], w.qk[2 * i], x.x, x.y);
    if (i < 2) ptx::mma_m16n8k16<bf16>(v[0], w.v[2 * i], x.x, x.y);
    ptx::mma_m16n8k16<bf16>(qk[1], w.qk[2 * i + 1], x.z, x.w);
    if (i < 2) ptx::mma_m16n8k16<bf16>(v[1], w.v[2 * i + 1], x.z, x.w);
    squares.step(i);
  }
  squares.step(4);
  squares.template store<S::row_a>(self, self.sums_a);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    qk[0][i] += qk[1][i];
    v[0][i] += v[1][i];
  }
  fold<S>(v[0]);
  store_sums<S, S::row_a, true>(self.sums_a, self.warp, self.lane, 0, qk[0]);
  store_sums<S, S::row_a, false>(self.sums_a, self.warp, self.lane, 16, v[0]);
}

struct OutWeights {
  uint32_t w[4][4];
};
template <int kHeads, int kRows>
__device__ __forceinline__ uint32_t load_weights(const Worker<kHeads, kRows>& self, OutWeights& w) {
  const uint32_t inputs = self.ring.address(0) + 2048 * self.warp;
  return load_weights(inputs, inputs + 1024, self.lane, w.w);
}
template <int kHeads, int kRows>
__device__ __forceinline__ void multiply(const Worker<kHeads, kRows>& self, const OutWeights& w) {
  using S = PersistentShape<kHeads, kRows>;
  float d[4][4] = {};
  const uint32_t* inputs = staged_inputs<S, true>(self.staging, 64, 32, self.lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 x = load_inputs(inputs, i);
    ptx::mma_m16n8k16<bf16>(d[2 * i], w.w[2 * i], x.x, x.y);
    ptx::mma_m16n8k16<bf16>(d[2 * i + 1], w.w[2 * i + 1], x.z, x.w);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
  fold<S>(d[0]);
  store_sums<S, S::row_a, false>(self.sums_a, self.warp, self.lane, 0, d[0]);
}

/// Pairs of tiles, of gate and up or of the head, four of them at a time.
template <int kPairs>
struct PairWeights {
  uint32_t w[kPairs][8][4];
};
using TileWeights = PairWeights<4>;
/// Pairs kFirst ... kEnd - 1, from the next stages.
template <int kFirst, int kEnd, int kPairs, int kHeads, int kRows>
__device__ __forceinline__ uint32_t load_weights(const Worker<kHeads, kRows>& self, PairWeights<kPairs>& w) {
  const uint32_t inputs = 2048 * self.warp;
  uint32_t bits = 0;
#pragma unroll
  for (int n = kFirst; n < kEnd; ++n) {
    const int i = 2 * (n - kFirst);
    bits |= load_weights(self.ring.address(i) + inputs, self.ring.address(i + 1) + inputs, self.lane, w.w[n]);
  }
  return bits;
}
/// Sums to sums (warps, rows, kStride), the last of which is the sum of squares.
template <int kStride, int kPairs, int kHeads, int kRows>
__device__ __forceinline__ void multiply(const Worker<kHeads, kRows>& self, const PairWeights<kPairs>& w, float* sums) {
  using S = PersistentShape<kHeads, kRows>;
  Squares<kHeads, kRows> squares(self);
  float d[kPairs][4] = {};
  const uint32_t* inputs = staged_inputs<S, false>(self.staging, 64, 0, self.lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = load_inputs(inputs, i);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) ptx::mma_m16n8k16<bf16>(d[n], w.w[n][2 * i], x.x, x.y);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) ptx::mma_m16n8k16<bf16>(d[n], w.w[n][2 * i + 1], x.z, x.w);
    squares.step(i);
  }
  squares.step(4);
  squares.template store<kStride>(self, sums);
#pragma unroll
  for (int n = 0; n < kPairs; ++n) store_sums<S, kStride, true>(sums, self.warp, self.lane, 16 * n, d[n]);
}

/// Down, whose inputs are received and multiplied in halves of 256 where there are many rows; sums are the same.
struct DownWeights {
  uint32_t w[2][8][4];  // half, steps of 16 of its first 128 inputs and, below, of its other 128
};
template <int kHeads, int kRows>
__device__ __forceinline__ uint32_t load_weights(const Worker<kHeads, kRows>& self, DownWeights& w) {
  using S = PersistentShape<kHeads, kRows>;
  uint32_t bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int block = 8 * self.warp + 4 * half;  // of 64 inputs; a stage has as many as there are heads
    const uint32_t inputs = self.ring.address(block / S::heads) + block % S::heads * 1024;
    bits |= load_weights(inputs, inputs + 2048, self.lane, w.w[half]);
  }
  return bits;
}
template <int kHeads, int kRows>
__device__ __forceinline__ void multiply(const Worker<kHeads, kRows>& self, const DownWeights& w, int half,
                                         float (&d)[4][4]) {
  using S = PersistentShape<kHeads, kRows>;
  const uint32_t* inputs = staged_inputs<S, true>(self.staging, S::gated_words, 64, self.lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 x = load_inputs(inputs, (S::passes == 1 ? 8 * half : 0) + i);
    ptx::mma_m16n8k16<bf16>(d[2 * i % 4], w.w[half][2 * i], x.x, x.y);
    ptx::mma_m16n8k16<bf16>(d[2 * i % 4 + 1], w.w[half][2 * i + 1], x.z, x.w);
  }
}
template <int kHeads, int kRows>
__device__ __forceinline__ void store_down(const Worker<kHeads, kRows>& self, float (&d)[4][4]) {
  using S = PersistentShape<kHeads, kRows>;
#pragma unroll
  for (int i = 0; i < 4; ++i) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
  fold<S>(d[0]);
  store_sums<S, S::row_c, false>(self.sums_c, self.warp, self.lane, 0, d[0]);
}

}  // namespace vivace::step
