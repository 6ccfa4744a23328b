// What the online softmax (Milakov and Gimelshein, arXiv 1805.02867) of every kernel is made of.
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

/// Closes a row whose probabilities are 2^(score - offset), of which the caller has `sum`, a quarter of the row's: returns
/// log(sum exp(score)), natural, -inf for a row that saw nothing; `factor` normalises o (0 for such a row). sink: a logit
/// (natural) with no value behind it; -inf: none.
__device__ __forceinline__ float finish_row(float offset, float sum, float sink, float& factor) {
  float total = quad_sum(sum);
  if (total == 0.0f) {
    factor = 0.0f;
    return -INFINITY;
  }
  factor = 1.0f;
  if (sink != -INFINITY) {
    const float sink_log2 = sink * kLog2E;
    const float top = fmaxf(offset, sink_log2);
    factor = ptx::exp2_approx(offset - top);
    total = fmaf(total, factor, ptx::exp2_approx(sink_log2 - top));
    offset = top;
  }
  factor /= total;
  return fmaf(offset, kLn2, logf(total));
}

}  // namespace vivace
