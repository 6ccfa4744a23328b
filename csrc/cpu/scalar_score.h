// Scores one at a time, in double: for float64 inputs and for the probe.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "csrc/cpu/sequence.h"

namespace vivace::cpu {

inline double to_double(double x) { return x; }
inline double to_double(float x) { return x; }
inline double to_double(BFloat16 x) { return to_float(x); }
inline double to_double(Float16 x) { return to_float(x); }

/// The score of query `query` and key `key`, which must be visible as far as windows go; -inf where bias hides it.
/// softcap_slope, where given, gets the derivative of the softcap.
template <typename T>
double scalar_score(const AttentionParams& p, const Sequence& s, int64_t head, int64_t query, int64_t key, const T* q,
                    const T* k, double* softcap_slope = nullptr) {
  double score = 0.0;
  for (int64_t d = 0; d < p.head_dim; ++d) score += to_double(q[d]) * to_double(k[d]);
  score *= p.softmax_scale;
  if (softcap_slope != nullptr) *softcap_slope = 1.0;
  if (p.softcap > 0.0f) {
    const double capped = std::tanh(score / p.softcap);
    if (softcap_slope != nullptr) *softcap_slope = 1.0 - capped * capped;
    score = capped * p.softcap;
  }
  if (p.alibi_slopes != nullptr) {
    const double distance = std::abs(static_cast<double>(query + s.keys - s.queries - key));
    score -= p.alibi_slopes[s.index * p.alibi_batch_stride + head] * distance;
  }
  if (p.bias != nullptr) {
    double bias;
    if (p.bias_dtype == DType::kFloat64) {
      bias = static_cast<const double*>(
          p.bias)[s.index * p.bias_stride[0] + head * p.bias_stride[1] + query * p.bias_stride[2] + key * p.bias_stride[3]];
    } else {
      float single;
      load_bias(p, s.index, head, query, key, 1, &single);
      bias = single;
    }
    score = bias == -std::numeric_limits<double>::infinity() ? bias : score + bias;
  }
  return score;
}

}  // namespace vivace::cpu
