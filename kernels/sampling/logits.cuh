// A request's logits as the sampling kernels see them.
#pragma once

#include <cstdint>

#include "kernels/common/convert.cuh"
#include "kernels/sampling/sample.h"

namespace vivace {

/// Bits that order as the floats do, negative ones too; NaN beyond the infinities.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The float whose ordered_bits these are.
__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

/// The unnormalised probability of a logit: 1 for the largest, even if that is infinite; 0 for NaN.
__device__ __forceinline__ float weight_of(float logit, float largest) {
  return logit == largest ? 1.0f : logit < largest ? expf(__fsub_rn(logit, largest)) : 0.0f;
}

/// What one request asks for. All loads are independent of each other, so that they take the time of one. kShort: strides
/// fit 32 bits.
struct DrawRequest {
  int32_t cond, uncond;  // rows of logits; cond negative: padding of sample_advance; uncond negative: none
  float cfg_weight, temperature, penalty, min_p, top_p;
  int32_t top_k;
  int64_t seed, step;

  template <bool kShort = false>
  __device__ __forceinline__ static DrawRequest load(const SampleParams& p, int64_t r) {
    const auto at = [&](int64_t stride) {
      return kShort ? static_cast<int64_t>(static_cast<int32_t>(r)) * static_cast<int32_t>(stride) : r * stride;
    };
    DrawRequest q;
    q.cond = p.rows[2 * r];
    q.uncond = p.rows[2 * r + 1];
    q.cfg_weight = p.cfg_weight[at(p.cfg_weight_stride)];
    q.temperature = p.temperature[at(p.temperature_stride)];
    q.penalty = p.repetition_penalty[at(p.repetition_penalty_stride)];
    q.min_p = p.min_p[at(p.min_p_stride)];
    q.top_p = p.top_p[at(p.top_p_stride)];
    q.top_k = p.top_k[at(p.top_k_stride)];
    q.seed = p.seed == nullptr ? 0 : p.seed[at(p.seed_stride)];
    q.step = p.step == nullptr ? 0 : p.step[at(p.step_stride)];
    return q;
  }

  __device__ __forceinline__ bool padding(const SampleParams& p) const { return p.next_step != nullptr && cond < 0; }
  __device__ __forceinline__ bool greedy() const { return !(temperature > 0.0f); }
  /// The least weight that min-p keeps: never more than that of the largest.
  __device__ __forceinline__ float cutoff() const { return fminf(fmaxf(min_p, 0.0f), 1.0f); }
  __device__ __forceinline__ bool filtered(int64_t vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1.0f; }
};

/// Division of many by one: quotients rounded as __fdiv_rn's, at three instructions each. With a reciprocal that is
/// correctly rounded, as its remainder shows, so is the corrected quotient (Markstein), where nothing over- or underflows.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(float x) : x_(x), reciprocal_(1.0f / x), usual_(is_usual(x)) {}

  __device__ __forceinline__ float value() const { return x_; }
  template <int kCount>
  __device__ __forceinline__ void divide(float (&y)[kCount]) const {
    bool usual = usual_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) usual = usual && is_usual(y[i]);
    if (usual) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float q = __fmul_rn(y[i], reciprocal_);
        y[i] = __fmaf_rn(__fmaf_rn(-q, x_, y[i]), reciprocal_, q);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i) {  // each comes to the first place once
        const float q = __fdiv_rn(y[0], x_);
#pragma unroll
        for (int k = 1; k < kCount; ++k) y[k - 1] = y[k];
        y[kCount - 1] = q;
      }
    }
  }

 private:
  /// From 2^-60 to 2^60.
  __device__ static bool is_usual(float x) {
    constexpr uint32_t kLeast = (127u - 60) << 24, kRange = 120u << 24;
    return 2 * __float_as_uint(x) - kLeast < kRange;
  }

  float x_, reciprocal_;
  bool usual_;
};

/// The request's logits before the softmax: guidance, penalty, temperature. Rounded after each operation, as on the CPU.
template <typename T>
struct Logits {
  const T* cond;
  const T* uncond;  // or null
  const uint8_t* seen;
  float cfg_weight;
  Divisor penalty, temperature;
  bool greedy;

  __device__ __forceinline__ Logits(const SampleParams& p, int64_t r, const DrawRequest& request)
      : cfg_weight(request.cfg_weight),
        penalty(request.penalty),
        temperature(request.temperature),
        greedy(request.greedy()) {
    const T* logits = static_cast<const T*>(p.logits);
    const int64_t last = p.logit_rows - 1;  // rows outside the logits cannot raise here; they must not be read either
    const int64_t cond_row = request.cond, uncond_row = request.uncond;
    cond = logits + (cond_row < 0 ? 0 : cond_row < last ? cond_row : last) * p.logits_stride;
    uncond = uncond_row < 0 ? nullptr : logits + (uncond_row < last ? uncond_row : last) * p.logits_stride;
    seen = p.seen + r * p.seen_stride;
  }

  /// Of a few entries; `was_seen`: a bit each.
  template <int kCount>
  __device__ __forceinline__ void values(const float (&c)[kCount], const float (&u)[kCount], uint32_t was_seen,
                                         float (&l)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      l[i] = uncond != nullptr ? __fadd_rn(c[i], __fmul_rn(cfg_weight, __fsub_rn(c[i], u[i]))) : c[i];
    }
    if (was_seen != 0) {
      float divided[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) divided[i] = l[i];
      penalty.divide(divided);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (was_seen >> i & 1) l[i] = l[i] < 0.0f ? __fmul_rn(l[i], penalty.value()) : divided[i];
      }
    }
    if (!greedy) temperature.divide(l);
  }

  __device__ __forceinline__ float operator()(int i) const {
    const float c[1] = {to_float(cond[i])}, u[1] = {uncond != nullptr ? to_float(uncond[i]) : 0.0f};
    float l[1];
    values(c, u, seen[i] != 0 ? 1 : 0, l);
    return l[0];
  }
};

/// What a drawn token changes: the token itself, the ids seen, and with sample_advance all that moves on. One thread loads
/// it early and prepares it, so that nothing but stores is left when the token is known.
class RequestState {
 public:
  __device__ __forceinline__ void load(const SampleParams& p, int64_t r, const DrawRequest& request) {
    if (p.next_step == nullptr) return;
    advance_ = p.advance[r];
    position_ = p.positions[r];
    if (p.history != nullptr) turn_ = static_cast<uint64_t>(p.turn[r]);
    row_[0] = request.cond;
    row_[1] = request.uncond;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row_[i] >= p.logit_rows) row_[i] = -1;
      if (row_[i] >= 0) length_[i] = p.cache_seqlens[row_[i]];
    }
  }

  __device__ __forceinline__ void prepare(const SampleParams& p, const DrawRequest& request) {
    if (p.next_step == nullptr) return;
    if (p.history != nullptr) slot_ = static_cast<int64_t>(turn_ % static_cast<uint64_t>(p.history_slots));
    step_ = request.step + advance_;
    position_ = position_ + advance_ < p.last_position ? position_ + advance_ : p.last_position;
#pragma unroll
    for (int i = 0; i < 2; ++i) length_[i] += static_cast<int32_t>(advance_);
  }

  /// After the request's other threads have read what they need.
  __device__ __forceinline__ void finish(const SampleParams& p, int64_t r, int token) const {
    p.tokens[r] = token;
    p.seen[r * p.seen_stride + token] = 1;
    if (p.next_step == nullptr) return;
    if (p.history != nullptr) {
      p.history[slot_ * p.history_stride + r] = token;
      p.turn[r] = static_cast<int64_t>(turn_ + 1);
    }
    p.next_step[r * p.step_stride] = step_;
    p.positions[r] = position_;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row_[i] >= 0) p.cache_seqlens[row_[i]] = length_[i];
    }
  }

 private:
  int64_t advance_ = 0, step_ = 0, position_ = 0, slot_ = 0;
  uint64_t turn_ = 0;
  int32_t row_[2] = {-1, -1}, length_[2] = {0, 0};
};

}  // namespace vivace
