// Softmax over the keys of one row and head of 64 dimensions, as groups of 8 lanes (in the chain) and then four warps (in
// the split kernel, too) see parts of them.
#pragma once

#include "kernels/common/ptx.cuh"

namespace vivace::step {

/// Over some keys, scores in powers of two: maximum, sum, and this lane's 8 dimensions of the unnormalised output.
struct SoftmaxState {
  float max = -INFINITY, sum = 0.0f, out[8] = {};

  /// Floats of a warp's state in shared memory: 64 of the output, then these two.
  static constexpr int kFloats = 66, kMax = 64, kSum = 65;

  /// Takes in the maximum of further scores, -inf where there is no key; what their exponentials are relative to.
  template <int kKeys>
  __device__ __forceinline__ float raise(const float (&scores)[kKeys]) {
    float largest = max;
#pragma unroll
    for (int u = 0; u < kKeys; ++u) largest = fmaxf(largest, scores[u]);
    const float offset = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet: not -inf - -inf
    const float rescale = ptx::exp2_approx(max - offset);
    max = largest;
    sum *= rescale;
#pragma unroll
    for (int d = 0; d < 8; ++d) out[d] *= rescale;
    return offset;
  }

  /// Merges with the lane `distance` away.
  __device__ __forceinline__ void merge(int distance) {
    const float other = __shfl_xor_sync(~0u, max, distance);
    const float largest = fmaxf(max, other), offset = largest == -INFINITY ? 0.0f : largest;
    const float mine = ptx::exp2_approx(max - offset), its = ptx::exp2_approx(other - offset);
    max = largest;
    sum = sum * mine + __shfl_xor_sync(~0u, sum, distance) * its;
#pragma unroll
    for (int d = 0; d < 8; ++d) out[d] = out[d] * mine + __shfl_xor_sync(~0u, out[d], distance) * its;
  }

  /// Of a warp whose groups have merged: to row `warp` of (4, kFloats), by lanes 0 to 7, `dim` being the lane's first
  /// dimension.
  __device__ __forceinline__ void store(float* states, int warp, int lane, int dim) const {
    if (lane < 8) {
#pragma unroll
      for (int d = 0; d < 8; ++d) states[warp * kFloats + dim + d] = out[d];
      if (lane == 0) {
        states[warp * kFloats + kMax] = max;
        states[warp * kFloats + kSum] = sum;
      }
    }
  }
};

/// Four warps' states as one: dimensions 2 * lane and 2 * lane + 1 of the output (0 without keys), and the sum relative to
/// 2^offset.
struct SoftmaxOutput {
  float lo = 0.0f, hi = 0.0f, sum = 0.0f, offset;

  __device__ __forceinline__ SoftmaxOutput(const float* states, int lane) {  // states: (4, kFloats)
    using S = SoftmaxState;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < 4; ++w) largest = fmaxf(largest, states[w * S::kFloats + S::kMax]);
    offset = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float weight = ptx::exp2_approx(states[w * S::kFloats + S::kMax] - offset);
      const float2 part = *reinterpret_cast<const float2*>(states + w * S::kFloats + 2 * lane);
      sum += weight * states[w * S::kFloats + S::kSum];
      lo += weight * part.x;
      hi += weight * part.y;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    lo *= inverse;
    hi *= inverse;
  }
};

}  // namespace vivace::step
