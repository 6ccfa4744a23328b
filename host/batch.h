// The requests that are generating, and their state on the device.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "host/alignment.h"
#include "host/manifest.h"
#include "host/request.h"

namespace vivace {

using Clock = std::chrono::steady_clock;

/// One request from submission to result. `result` and `finished` belong to the engine's mutex, the rest to the worker.
struct Job {
  Request request;
  Result result;
  std::atomic<bool> cancel{false};
  Clock::time_point submitted, admitted, first_token;

  int32_t cond_row = -1, uncond_row = -1;  // of the KV cache; -1: none
  int64_t prompt_tokens = 0;               // positions of the prompt, the same in both rows
  int64_t limit = 0;                       // tokens at most: max_new_tokens, or what the cache has room for
  int64_t issued = 0;                      // tokens whose sampling has been queued
  int64_t last_token = 0;                  // latest delivered token
  bool done = false;                       // nothing of it is delivered any more
  at::Generator generator;                 // of Rng::kTorch
  std::optional<AlignmentAnalyzer> alignment;

  bool guided() const { return request.sampling.cfg_weight > 0; }
  /// vivace::sample, or sample_advance, does for it: no logits are edited and the draw is our own.
  bool plain() const { return !alignment && request.sampling.rng == Rng::kPhilox; }
  bool exhausted() const { return done || issued >= limit; }
};
using JobPtr = std::shared_ptr<Job>;

/// Views of the device state that one step reads and advances. n requests, m rows: the conditional rows of all requests,
/// then the unconditional rows of the guided ones, then padding.
struct StepState {
  at::Tensor tokens;       // (n) int64: the latest tokens
  at::Tensor positions;    // (n) int64: their speech positions
  at::Tensor row_request;  // (m) int64
  at::Tensor seqlens;      // (m) int32: keys in the cache
  at::Tensor cache_rows;   // (m) int32
  at::Tensor logit_rows;   // (n, 2) int32: conditional and unconditional row, or -1
  at::Tensor seen;         // (n, vocab) uint8
  at::Tensor cfg_weight, temperature, repetition_penalty, min_p, top_p;  // (n) fp32
  at::Tensor top_k;                                                      // (n) int32
  at::Tensor seed, step;                                                 // (n) int64
  at::Tensor turn;                                                       // (n) int64: entries of history so far
  at::Tensor history;                                                    // (slots, n) int64, of the host: latest tokens
  at::Tensor advance;                                                    // (n) int64: 1, and 0 in padding
  at::Tensor row_advance;                                                // (m) int32
};

/// Buffers of fixed address, so that a captured step can use them. What the host knows (positions, lengths, options) is
/// written anew when the set of requests changes; tokens and seen ids live on the device alone.
class Batch {
 public:
  /// scratch_row: the cache row of padding rows; negative: the step skips them (decode_step).
  Batch(const Manifest& manifest, int64_t max_requests, int32_t scratch_row, at::Device device);

  int64_t size() const { return static_cast<int64_t>(jobs_.size()); }
  bool empty() const { return jobs_.empty(); }
  const std::vector<JobPtr>& jobs() const { return jobs_; }
  int64_t rows() const;  // of the next step, without padding
  bool plain() const;    // all requests are
  bool aligned() const;  // some request has an analyzer

  /// Appends a request; its seen ids are reset to the start token.
  void add(JobPtr job);
  /// Removes a request; the last one takes its place.
  void remove(int64_t index);
  /// The host's counts no longer follow the device's (a prefill has sampled): the next upload writes them.
  void touch() { changed_ = true; }
  /// Brings the device up to date after add, remove and touch; cheap when nothing changed. Positions count what has been
  /// issued.
  void upload();

  /// After a step with sample_advance has been queued: the slots of history that its tokens come to, one a request.
  std::vector<int64_t> take_turns();
  const at::Tensor& history() const { return history_; }

  /// State of requests [first, first + n) and of rows [0, m).
  StepState state(int64_t first, int64_t n, int64_t m) const;

 private:
  const int64_t max_requests_, start_token_;
  const int32_t scratch_row_;
  bool changed_ = true;
  std::vector<JobPtr> jobs_;

  at::Tensor tokens_, seen_;
  at::Tensor history_;          // (slots, max_requests) int64, pinned: sample_advance writes to it from the device
  std::vector<int64_t> turns_;  // of each column of history: what the device counts too
  at::Tensor longs_;            // (6, max_rows) int64: positions, step, seed, advance, row_request, turn
  at::Tensor ints_;             // (6, max_rows) int32: seqlens, cache_rows, row_advance, top_k, logit_rows (two rows' worth)
  at::Tensor floats_;           // (5, max_requests): cfg_weight, temperature, repetition_penalty, min_p, top_p
};

}  // namespace vivace
