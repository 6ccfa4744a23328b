// What happens to a score between q . k and the softmax beyond scaling, and to a probability before it meets v.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention/mask.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/philox.h"

namespace vivace {

/// cap * tanh(x / cap), tanh by 1 - 2 / (e^2x + 1): absolute error ~ cap * 1e-7, where tanh.approx has cap * 5e-4.
__device__ __forceinline__ float softcapped(float x, float cap) {
  const float e = ptx::exp2_approx(x * (2.0f * kLog2E / cap));
  return cap - 2.0f * cap * ptx::rcp_approx(e + 1.0f);
}

/// The terms of a score in order: scale, softcap, alibi, bias. Of one head of one batch entry.
struct ScoreTerms {
  float scale, softcap, slope;
  bool has_alibi;
  DType bias_dtype;
  const void* bias;     // null: none
  int64_t bias_offset;  // elements to (batch, head, 0, 0)
  int64_t bias_row_stride, bias_key_stride;

  __device__ __forceinline__ ScoreTerms(const AttentionParams& p, int batch, int head)
      : scale(p.softmax_scale),
        softcap(p.softcap),
        slope(0.0f),
        has_alibi(p.alibi_slopes != nullptr),
        bias_dtype(p.bias_dtype),
        bias(p.bias),
        bias_offset(batch * p.bias_stride[0] + head * p.bias_stride[1]),
        bias_row_stride(p.bias_stride[2]),
        bias_key_stride(p.bias_stride[3]) {
    if (has_alibi) slope = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  /// Whether there is nothing but the scale, which the softmax can then fold into its exponent as the plain kernel does.
  __device__ __forceinline__ bool only_scale() const {
    return softcap <= 0.0f && !has_alibi && bias == nullptr && scale > 0.0f;
  }

  /// A score without its bias.
  __device__ __forceinline__ float operator()(float qk, int diagonal, int j) const {
    float s = qk * scale;
    if (softcap > 0.0f) s = softcapped(s, softcap);
    if (has_alibi) s -= slope * fabsf(static_cast<float>(diagonal - j));
    return s;
  }

  /// s plus the bias of (i, j), which must be visible: elsewhere there may be no memory.
  template <typename B>
  __device__ __forceinline__ float biased(float s, int64_t row_offset, int j) const {
    const B* at = static_cast<const B*>(bias) + (row_offset + j * bias_key_stride);
    if constexpr (sizeof(B) == 1)
      return *at != 0 ? s : -INFINITY;  // bool
    else
      return s + to_float(*at);
  }

  /// Adds the bias to fragments (layout and column0 as in mask_scores) of rows i and i + 8.
  template <typename B, int kFrags>
  __device__ __forceinline__ void add_bias(float (&s)[kFrags][4], const VisibleKeys& upper, const VisibleKeys& lower, int i,
                                           int column0) const {
    const int64_t upper_offset = bias_offset + i * bias_row_stride;
    const int64_t lower_offset = upper_offset + 8 * bias_row_stride;
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = column0 + 8 * f + (e & 1);
        if ((e < 2 ? upper : lower).contains(j)) s[f][e] = biased<B>(s[f][e], e < 2 ? upper_offset : lower_offset, j);
      }
    }
  }

  /// All terms, for fragments of rows i and i + 8 of a sequence whose row 0 stands at `shift`.
  template <typename T, int kFrags>
  __device__ __forceinline__ void apply(float (&s)[kFrags][4], const VisibleKeys& upper, const VisibleKeys& lower, int i,
                                        int shift, int column0) const {
#pragma unroll
    for (int f = 0; f < kFrags; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[f][e] = (*this)(s[f][e], i + shift + (e < 2 ? 0 : 8), column0 + 8 * f + (e & 1));
    }
    if (bias == nullptr) return;
    if (bias_dtype == DType::kFloat32) {
      add_bias<float>(s, upper, lower, i, column0);
    } else if (bias_dtype == DType::kBool) {
      add_bias<uint8_t>(s, upper, lower, i, column0);
    } else {
      add_bias<T>(s, upper, lower, i, column0);
    }
  }
};

/// Dropout of the probabilities of one head; kernels/common/philox.h defines which elements are kept.
struct Dropout {
  int64_t seed = 0, offset = 0, head_row = 0;
  uint32_t threshold = 255;  // a byte up to this keeps its element
  bool on = false;

  __device__ __forceinline__ Dropout(const AttentionParams& p, int batch, int head) {
    on = p.dropout_p > 0.0f;
    if (!on) return;
    seed = p.rng_state[0];
    offset = p.rng_state[1];
    head_row = batch * p.heads + head;
    threshold = dropout_threshold(p.dropout_p);
  }

  __device__ __forceinline__ bool keeps(const Philox4& draw, int j) const { return dropout_byte(draw, j) <= threshold; }

  /// Drops elements of fragments of rows i and i + 8; key0: of the tile, a multiple of 16. A draw serves 16 keys of a row,
  /// so the four lanes that share a row make one draw each (2 groups of 16 keys x 2 rows) and pass the words around.
  template <int kFrags>
  __device__ __forceinline__ void apply(float (&s)[kFrags][4], int i, int key0) const {
    const int quad_lane = threadIdx.x % 4;
#pragma unroll
    for (int f0 = 0; f0 < kFrags; f0 += 4) {  // 32 keys
      const Philox4 mine =
          dropout_draw(seed, offset, head_row, i + 8 * (quad_lane & 1), key0 + 8 * f0 + 16 * (quad_lane >> 1));
#pragma unroll
      for (int source = 0; source < 4; ++source) {
        const int r = source & 1, f = f0 + 2 * (source >> 1);
        Philox4 draw;
#pragma unroll
        for (int w = 0; w < 4; ++w) draw.x[w] = __shfl_sync(0xffffffffu, mine.x[w], source, 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Columns 8 * half + 2 * quad_lane + {0, 1} of the 16: two neighbouring bytes of word 2 * half + quad_lane / 2.
          const uint32_t word = quad_lane < 2 ? draw.x[2 * half] : draw.x[2 * half + 1];
          const uint32_t bytes = word >> (16 * (quad_lane & 1));
          if ((bytes & 0xffu) > threshold) s[f + half][2 * r] = 0.0f;
          if (((bytes >> 8) & 0xffu) > threshold) s[f + half][2 * r + 1] = 0.0f;
        }
      }
    }
  }
};

}  // namespace vivace
