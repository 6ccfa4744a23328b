// One sampling step on the CPU: Chatterbox's order, in fp32 where Chatterbox computes in fp32. This file is compiled
// without contraction to fused multiply-adds, so that logits round as torch's do.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/error.h"
#include "csrc/parallel.h"
#include "kernels/common/philox.h"

namespace vivace::cpu {

namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

/// The parameters of request r.
struct Request {
  int64_t cond, uncond;  // rows of logits; uncond -1: none
  float cfg_weight, temperature, repetition_penalty, min_p, top_p;
  int64_t top_k;
};

Request request_of(const SampleParams& p, int64_t r) {
  return {p.rows[2 * r],
          p.rows[2 * r + 1],
          p.cfg_weight[r * p.cfg_weight_stride],
          p.temperature[r * p.temperature_stride],
          p.repetition_penalty[r * p.repetition_penalty_stride],
          p.min_p[r * p.min_p_stride],
          p.top_p[r * p.top_p_stride],
          p.top_k[r * p.top_k_stride]};
}

template <typename T>
void load_logits_of(const void* logits, int64_t offset, int64_t vocab, float* to) {
  const T* row = static_cast<const T*>(logits) + offset;
  for (int64_t i = 0; i < vocab; ++i) to[i] = to_float(row[i]);
}

void load_logits(const SampleParams& p, int64_t row, float* to) {
  const auto load = p.logits_dtype == DType::kBFloat16  ? load_logits_of<BFloat16>
                    : p.logits_dtype == DType::kFloat16 ? load_logits_of<Float16>
                                                        : load_logits_of<float>;
  load(p.logits, row * p.logits_stride, p.vocab, to);
}

/// The work of one thread: buffers of vocab entries.
class Sampler {
 public:
  explicit Sampler(const SampleParams& params)
      : p_(params), logits_(static_cast<size_t>(params.vocab)), probs_(logits_.size()) {}

  void run(int64_t r) {
    const Request request = request_of(p_, r);
    if (p_.next_step != nullptr && request.cond < 0) return;  // padding
    guide_and_penalise(request, p_.seen + r * p_.seen_stride);
    int64_t token = largest();
    if (request.temperature == 0.0f) {
      std::fill(probs_.begin(), probs_.end(), 0.0f);
      probs_[static_cast<size_t>(token)] = 1.0f;
    } else {
      if (request.temperature != 1.0f) {
        for (float& x : logits_) x /= request.temperature;
      }
      if (request.top_k > 0 && request.top_k < p_.vocab) keep_top_k(request.top_k);
      if (request.min_p > 0.0f) keep_min_p(request.min_p);
      if (request.top_p < 1.0f) keep_top_p(request.top_p);
      softmax();
      if (p_.tokens != nullptr) token = draw(p_.seed[r * p_.seed_stride], p_.step[r * p_.step_stride], token);
    }
    if (p_.probs != nullptr) std::copy(probs_.begin(), probs_.end(), p_.probs + r * p_.vocab);
    if (p_.tokens != nullptr) {
      p_.tokens[r] = token;
      p_.seen[r * p_.seen_stride + token] = 1;
    }
    if (p_.next_step != nullptr) move_on(r, request, token);
  }

 private:
  /// What sample_advance adds to a sample.
  void move_on(int64_t r, const Request& request, int64_t token) {
    const int64_t advance = p_.advance[r];
    if (p_.history != nullptr) {
      const auto turn = static_cast<uint64_t>(p_.turn[r]++);
      p_.history[static_cast<int64_t>(turn % static_cast<uint64_t>(p_.history_slots)) * p_.history_stride + r] = token;
    }
    p_.next_step[r * p_.step_stride] += advance;
    p_.positions[r] = std::min(p_.positions[r] + advance, p_.last_position);
    p_.cache_seqlens[request.cond] += static_cast<int32_t>(advance);
    if (request.uncond >= 0) p_.cache_seqlens[request.uncond] += static_cast<int32_t>(advance);
  }

  void guide_and_penalise(const Request& request, const uint8_t* seen) {
    load_logits(p_, request.cond, logits_.data());
    if (request.uncond >= 0) {
      std::vector<float>& uncond = probs_;
      load_logits(p_, request.uncond, uncond.data());
      for (size_t i = 0; i < logits_.size(); ++i) logits_[i] += request.cfg_weight * (logits_[i] - uncond[i]);
    }
    const float penalty = request.repetition_penalty;
    if (penalty == 1.0f) return;
    for (size_t i = 0; i < logits_.size(); ++i) {
      if (seen[i] != 0) logits_[i] = logits_[i] < 0.0f ? logits_[i] * penalty : logits_[i] / penalty;
    }
  }

  /// The first of the largest logits.
  int64_t largest() const { return std::max_element(logits_.begin(), logits_.end()) - logits_.begin(); }

  void softmax() {
    const float top = *std::max_element(logits_.begin(), logits_.end());
    const double sum = kernels().exp(logits_.data(), top, probs_.data(), p_.vocab);
    const float total = static_cast<float>(sum);
    for (float& x : probs_) x /= total;
  }

  void keep_top_k(int64_t k) {
    probs_ = logits_;
    std::nth_element(probs_.begin(), probs_.begin() + (k - 1), probs_.end(), std::greater<float>());
    const float least = probs_[static_cast<size_t>(k - 1)];
    for (float& x : logits_) {
      if (x < least) x = kDropped;
    }
  }

  void keep_min_p(float min_p) {
    softmax();
    const float top = *std::max_element(probs_.begin(), probs_.end());
    const float least = std::min(min_p * top, top);  // the largest always stays
    for (size_t i = 0; i < logits_.size(); ++i) {
      if (probs_[i] < least) logits_[i] = kDropped;
    }
  }

  /// Keeps the probabilities above the one at which the ascending cumulative mass is still at most 1 - top_p.
  void keep_top_p(float top_p) {
    softmax();
    ascending_.clear();
    for (float x : probs_) {
      if (x > 0.0f) ascending_.push_back(x);
    }
    if (ascending_.empty()) return;
    std::sort(ascending_.begin(), ascending_.end());
    const float dropped_mass = 1.0f - top_p;
    float least = ascending_.back();  // the largest always stays
    double mass = 0.0;
    for (size_t i = 0; i < ascending_.size();) {
      const float value = ascending_[i];
      for (; i < ascending_.size() && ascending_[i] == value; ++i) mass += static_cast<double>(value);  // ties as a group
      if (static_cast<float>(mass) > dropped_mass) {
        least = value;
        break;
      }
    }
    for (size_t i = 0; i < logits_.size(); ++i) {
      if (probs_[i] < least) logits_[i] = kDropped;
    }
  }

  /// argmin of -log(u_i) / p_i: exponential clocks of rate p_i, the first to ring. `fallback` where no p is positive (NaN).
  int64_t draw(int64_t seed, int64_t step, int64_t fallback) const {
    int64_t token = fallback;
    float earliest = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < p_.vocab; ++i) {
      const float probability = probs_[static_cast<size_t>(i)];
      if (!(probability > 0.0f)) continue;
      const float time = -std::log(sampling_uniform(seed, step, i)) / probability;
      if (time < earliest) {
        earliest = time;
        token = i;
      }
    }
    return token;
  }

  const SampleParams& p_;
  std::vector<float> logits_, probs_, ascending_;
};

}  // namespace

void sample(const SampleParams& p) {
  const char* op = p.next_step != nullptr ? "sample_advance" : p.tokens != nullptr ? "sample" : "sampling_probs";
  check(p.vocab > 0 || p.requests == 0, op, "logits has an empty vocabulary");
  for (int64_t r = 0; r < p.requests; ++r) {
    const Request request = request_of(p, r);
    if (p.next_step != nullptr && request.cond < 0) continue;
    check(request.cond >= 0 && request.cond < p.logit_rows && request.uncond < p.logit_rows, op, "rows[", r, "] is (",
          request.cond, ", ", request.uncond, "), logits has ", p.logit_rows, " rows");
  }
  parallel_for(0, p.requests, 1, [&](int64_t begin, int64_t end) {
    Sampler sampler(p);
    for (int64_t r = begin; r < end; ++r) sampler.run(r);
  });
}

}  // namespace vivace::cpu
