// From logits to tokens, each request by its own options.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <span>

#include "host/batch.h"
#include "host/manifest.h"

namespace vivace {

/// Samples with vivace::sample alone and writes the tokens to state.tokens. Device work only: can be captured.
/// logits (rows, vocab) fp32; `state` is that of the requests sampled.
void sample_plain(const at::Tensor& logits, const StepState& state);

/// The same and `advance` in one kernel (vivace::sample_advance), for a step of the batch: its rows are those of logits.
/// The tokens also go to state.history.
void sample_step(const at::Tensor& logits, const StepState& state, int64_t last_position);

/// The same for requests of every kind; synchronises where an alignment analyzer or a torch generator is involved.
/// logits may be edited. logit_rows: (requests, 2) int32 on the host, the same as state.logit_rows.
/// probes (heads, rows, frames, capacity) fp32, when a request has an analyzer.
void sample_any(at::Tensor logits, const StepState& state, const at::Tensor& logit_rows, std::span<const JobPtr> jobs,
                const std::optional<at::Tensor>& probes, const Manifest& manifest);

/// After a token has been sampled: positions, steps and lengths move on. Device work only.
void advance(const StepState& state, int64_t last_position);

}  // namespace vivace
