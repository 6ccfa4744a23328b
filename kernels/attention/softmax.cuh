// Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over accumulator fragments.
#pragma once

#include <cmath>

#include "kernels/common/ptx.cuh"

namespace vivace {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

/// Of a row that four neighbouring lanes share.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// State of this thread's two rows (lane / 4 and lane / 4 + 8) of a 16-row fragment. Scores are in units where
/// probability = 2^(score * scale_log2): the softmax scale is folded into the exponent, one FFMA an element.
struct OnlineSoftmax {
  float max[2];  // of the row so far, the same in the four lanes
  float sum[2];  // this lane's part of the row's denominator

  __device__ __forceinline__ OnlineSoftmax() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  /// Takes in a block of scores s, which become unnormalised probabilities, and rescales the output o so far, where a row's
  /// maximum grew by more than 2^8: up to there probabilities keep their relative precision. Called by whole warps.
  template <int kFragsS, int kFragsO>
  __device__ __forceinline__ void update(float (&s)[kFragsS][4], float (&o)[kFragsO][4], float scale_log2) {
    float block_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      block_max[r] = s[0][2 * r];
#pragma unroll
      for (int f = 0; f < kFragsS; ++f) block_max[r] = fmaxf(block_max[r], fmaxf(s[f][2 * r], s[f][2 * r + 1]));
      block_max[r] = quad_max(block_max[r]);
    }
    const bool grew = (block_max[0] - max[0]) * scale_log2 > 8.0f || (block_max[1] - max[1]) * scale_log2 > 8.0f;
    if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float old_max = max[r];
        max[r] = fmaxf(old_max, block_max[r]);
        const float offset = max[r] == -INFINITY ? 0.0f : max[r] * scale_log2;  // nothing seen yet: not -inf - -inf
        const float rescale = ptx::exp2_approx(fmaf(old_max, scale_log2, -offset));
        sum[r] *= rescale;
#pragma unroll
        for (int f = 0; f < kFragsO; ++f) {
          o[f][2 * r] *= rescale;
          o[f][2 * r + 1] *= rescale;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = max[r] == -INFINITY ? 0.0f : max[r] * scale_log2;
      float block_sum = 0.0f;
#pragma unroll
      for (int f = 0; f < kFragsS; ++f) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[f][e] = ptx::exp2_approx(fmaf(s[f][e], scale_log2, -offset));
          block_sum += s[f][e];
        }
      }
      sum[r] += block_sum;
    }
  }

  /// Closes row r: returns log(sum exp(score)), natural, -inf for a row that saw nothing; `factor` normalises o (0 for such
  /// a row). sink: a logit (natural) with no value behind it; -inf: none.
  __device__ __forceinline__ float finish(int r, float scale_log2, float sink, float& factor) const {
    float total = quad_sum(sum[r]);
    if (total == 0.0f) {
      factor = 0.0f;
      return -INFINITY;
    }
    float largest = max[r] * scale_log2;
    factor = 1.0f;
    if (sink != -INFINITY) {
      const float sink_log2 = sink * kLog2E;
      const float top = fmaxf(largest, sink_log2);
      factor = ptx::exp2_approx(largest - top);
      total = fmaf(total, factor, ptx::exp2_approx(sink_log2 - top));
      largest = top;
    }
    factor /= total;
    return fmaf(largest, kLn2, logf(total));
  }
};

}  // namespace vivace
