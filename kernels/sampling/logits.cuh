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

/// What one request asks for. All loads are independent of each other, so that they take the time of one.
struct DrawRequest {
  int32_t cond, uncond;  // rows of logits; cond negative: padding of sample_advance; uncond negative: none
  float cfg_weight, temperature, penalty, min_p, top_p;
  int32_t top_k;
  int64_t seed, step;

  __device__ __forceinline__ DrawRequest(const SampleParams& p, int64_t r) {
    cond = p.rows[2 * r];
    uncond = p.rows[2 * r + 1];
    cfg_weight = p.cfg_weight[r * p.cfg_weight_stride];
    temperature = p.temperature[r * p.temperature_stride];
    penalty = p.repetition_penalty[r * p.repetition_penalty_stride];
    min_p = p.min_p[r * p.min_p_stride];
    top_p = p.top_p[r * p.top_p_stride];
    top_k = p.top_k[r * p.top_k_stride];
    seed = p.seed == nullptr ? 0 : p.seed[r * p.seed_stride];
    step = p.step == nullptr ? 0 : p.step[r * p.step_stride];
  }

  __device__ __forceinline__ bool padding(const SampleParams& p) const { return p.next_step != nullptr && cond < 0; }
  __device__ __forceinline__ bool greedy() const { return !(temperature > 0.0f); }
  __device__ __forceinline__ bool filtered(int64_t vocab) const { return (top_k > 0 && top_k < vocab) || top_p < 1.0f; }
};

/// The request's logits before the softmax: guidance, penalty, temperature. Rounded after each operation, as on the CPU.
template <typename T>
struct Logits {
  const T* cond;
  const T* uncond;  // or null
  const uint8_t* seen;
  float cfg_weight, penalty, temperature;
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

  __device__ __forceinline__ float value(float c, float u, bool was_seen) const {
    float l = c;
    if (uncond != nullptr) l = __fadd_rn(l, __fmul_rn(cfg_weight, __fsub_rn(l, u)));
    if (was_seen) l = l < 0.0f ? __fmul_rn(l, penalty) : __fdiv_rn(l, penalty);
    return greedy ? l : __fdiv_rn(l, temperature);
  }

  __device__ __forceinline__ float operator()(int i) const {
    return value(to_float(cond[i]), uncond != nullptr ? to_float(uncond[i]) : 0.0f, seen[i] != 0);
  }
};

/// What a drawn token changes: the token itself, the ids seen, and with sample_advance all that moves on. One thread loads
/// it, early, so that nothing is left to be loaded when the token is known.
class RequestState {
 public:
  __device__ __forceinline__ void load(const SampleParams& p, int64_t r, const DrawRequest& request) {
    if (p.next_step == nullptr) return;
    advance_ = p.advance[r];
    step_ = request.step;
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

  /// After the request's other threads have read what they need.
  __device__ __forceinline__ void finish(const SampleParams& p, int64_t r, int token) const {
    p.tokens[r] = token;
    p.seen[r * p.seen_stride + token] = 1;
    if (p.next_step == nullptr) return;
    if (p.history != nullptr) {
      p.history[turn_ % static_cast<uint64_t>(p.history_slots) * p.history_stride + r] = token;
      p.turn[r] = static_cast<int64_t>(turn_ + 1);
    }
    p.next_step[r * p.step_stride] = step_ + advance_;
    const int64_t position = position_ + advance_;
    p.positions[r] = position < p.last_position ? position : p.last_position;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row_[i] >= 0) p.cache_seqlens[row_[i]] = length_[i] + static_cast<int32_t>(advance_);
    }
  }

 private:
  int64_t advance_ = 0, step_ = 0, position_ = 0;
  uint64_t turn_ = 0;
  int32_t row_[2] = {-1, -1}, length_[2] = {0, 0};
};

}  // namespace vivace
