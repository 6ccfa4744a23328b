#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// One sampling step for a batch of requests, in Chatterbox's order: classifier-free guidance, repetition penalty,
/// temperature, top-k, min-p, top-p, softmax, draw. Each request's result depends on its own row(s), parameters, seed and
/// step alone. Per-request arrays are strided views, stride in elements.
///
/// logits   l = cond + cfg_weight * (cond - uncond), or cond where rows[r][1] < 0
/// penalty  seen ids: l < 0 ? l * penalty : l / penalty
/// temperature 0 means greedy: probability 1 on the first largest (penalised) logit
/// min_p    drop p < min_p * max(p);  top_p: keep p where the mass of probabilities <= p exceeds 1 - top_p;
///          top_k > 0: keep the k largest; equal probabilities are kept or dropped together; the largest is always kept
/// padding  with sample_advance, a request whose rows[r][0] is negative is skipped
/// draw     token = argmin_i -log(u_i) / p_i (an exponential race), u from kernels/common/philox.h keyed by (seed, step, i)
struct SampleParams {
  const void* logits = nullptr;  // (rows, vocab), last dimension contiguous, of logits_dtype
  DType logits_dtype = DType::kFloat32;
  int64_t logits_stride = 0;
  int64_t requests = 0;
  int64_t vocab = 0;
  int64_t logit_rows = 0;
  const int32_t* rows = nullptr;  // (requests, 2) rows of logits: conditional, unconditional (or -1)
  uint8_t* seen = nullptr;        // (requests, vocab) nonzero: the id was generated before; the drawn token is marked
  int64_t seen_stride = 0;
  const float* cfg_weight = nullptr;
  const float* temperature = nullptr;
  const float* repetition_penalty = nullptr;
  const float* min_p = nullptr;
  const float* top_p = nullptr;
  const int32_t* top_k = nullptr;
  const int64_t* seed = nullptr;
  const int64_t* step = nullptr;  // sample_advance writes next_step, which is the same memory
  int64_t cfg_weight_stride = 1, temperature_stride = 1, repetition_penalty_stride = 1, min_p_stride = 1, top_p_stride = 1,
          top_k_stride = 1, seed_stride = 1, step_stride = 1;
  int64_t* tokens = nullptr;  // (requests) drawn tokens, or null
  float* probs = nullptr;     // (requests, vocab) contiguous: the final distribution, or null

  // What moves on with a step: sample_advance. All null otherwise.
  int64_t* next_step = nullptr;      // += advance
  int64_t* positions = nullptr;      // (requests), contiguous: += advance, at most last_position
  int32_t* cache_seqlens = nullptr;  // (logit_rows), contiguous: += advance for each request's rows
  const int64_t* advance = nullptr;  // (requests), contiguous
  int64_t last_position = 0;
  int64_t* history = nullptr;  // (history_slots, requests), rows history_stride apart: slot turn % history_slots; or null
  int64_t* turn = nullptr;     // (requests), contiguous: += 1; given with history
  int64_t history_slots = 0;
  int64_t history_stride = 0;
};

}  // namespace vivace
