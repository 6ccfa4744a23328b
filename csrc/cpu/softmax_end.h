// The end of a row's softmax: sinks, the sum's inverse, lse.
#pragma once

#include "csrc/cpu/half.h"
#include "kernels/attention/params.h"

namespace vivace::cpu {

/// `scale` turns accumulated values into the output.
struct SoftmaxEnd {
  float scale, lse;
};

/// A row whose sum is 0 has seen nothing: output 0, lse -inf. NaN sums are not 0 and stay.
VIVACE_INLINE SoftmaxEnd softmax_end(const AttentionParams& p, int64_t head, float largest, float sum) {
  if (sum == 0.0f) return {0.0f, -__builtin_inff()};
  float factor = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head], top = sink > largest ? sink : largest;
    factor = __builtin_expf(largest - top);
    sum = sum * factor + __builtin_expf(sink - top);
    largest = top;
  }
  const float kept = p.dropout_p > 0.0f ? 1.0f / (1.0f - p.dropout_p) : 1.0f;
  return {factor * kept / sum, largest + __builtin_logf(sum)};
}

}  // namespace vivace::cpu
