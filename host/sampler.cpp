#include "host/sampler.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace vivace {
namespace {

using at::Tensor;

StepState narrow(const StepState& s, int64_t first, int64_t n) {
  StepState part = s;
  for (Tensor* t :
       {&part.tokens, &part.positions, &part.logit_rows, &part.seen, &part.cfg_weight, &part.temperature,
        &part.repetition_penalty, &part.min_p, &part.top_p, &part.top_k, &part.seed, &part.step, &part.advance}) {
    *t = t->narrow(0, first, n);
  }
  return part;
}

Tensor call_sample(const Tensor& logits, const StepState& s) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("vivace::sample", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(logits, s.logit_rows, s.seen, s.cfg_weight, s.temperature, s.repetition_penalty, s.min_p, s.top_p, s.top_k,
                 s.seed, s.step);
}

Tensor call_sampling_probs(const Tensor& logits, const StepState& s) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("vivace::sampling_probs", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                           const Tensor&, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(logits, s.logit_rows, s.seen, s.cfg_weight, s.temperature, s.repetition_penalty, s.min_p, s.top_p, s.top_k);
}

/// Lets every analyzer see its step and edits the guided logits where it decides so. The guided logits replace the
/// conditional row, and the request is sampled without a second row.
void apply_alignment(Tensor& logits, Tensor& logit_rows, std::span<const JobPtr> jobs, const Tensor& probes,
                     const Manifest& manifest) {
  const Tensor attention = probes.mean(0).cpu();  // (rows, frames, capacity)
  auto rows = logit_rows.accessor<int32_t, 2>();
  for (size_t r = 0; r < jobs.size(); ++r) {
    Job& job = *jobs[r];
    if (!job.alignment || job.done) continue;
    const int64_t at = static_cast<int64_t>(r);
    const int64_t text = static_cast<int64_t>(job.request.text_tokens.size());
    const Tensor frames = attention[rows[at][0]].narrow(1, manifest.conditioning.length, text).contiguous();
    const auto decision =
        job.alignment->step({frames.const_data_ptr<float>(), static_cast<size_t>(frames.numel())}, job.last_token);
    if (decision == AlignmentDecision::kNone) continue;

    Tensor guided = logits[rows[at][0]];
    if (rows[at][1] >= 0) {
      guided = guided + (guided - logits[rows[at][1]]) * job.request.sampling.cfg_weight;
      rows[at][1] = -1;
    }
    constexpr float kLimit = 32768;  // 2^15, as in Chatterbox
    const bool force = decision == AlignmentDecision::kForceStop;
    if (force) guided = at::full_like(guided, -kLimit);
    guided.narrow(0, manifest.speech.stop_token, 1).fill_(force ? kLimit : -kLimit);
    logits[rows[at][0]].copy_(guided);
  }
}

}  // namespace

void sample_plain(const Tensor& logits, const StepState& state) {
  Tensor tokens = state.tokens;
  tokens.copy_(call_sample(logits, state));
}

void sample_step(const Tensor& logits, const StepState& s, int64_t last_position) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("vivace::sample_advance", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                         const std::optional<Tensor>&, const std::optional<Tensor>&)>();
  op.call(logits, s.logit_rows, s.seen, s.cfg_weight, s.temperature, s.repetition_penalty, s.min_p, s.top_p, s.top_k, s.seed,
          s.step, s.tokens, s.positions, s.seqlens, s.advance, last_position, s.history, s.turn);
}

void sample_any(Tensor logits, const StepState& state, const Tensor& logit_rows, std::span<const JobPtr> jobs,
                const std::optional<Tensor>& probes, const Manifest& manifest) {
  StepState s = state;
  if (probes) {
    Tensor rows = logit_rows.clone();
    apply_alignment(logits, rows, jobs, *probes, manifest);
    s.logit_rows = rows.to(logits.device());
  }
  // Neighbours that draw by Philox share a call; a torch generator serves one request at a time.
  for (size_t begin = 0; begin < jobs.size();) {
    size_t end = begin + 1;
    const bool philox = jobs[begin]->request.sampling.rng == Rng::kPhilox;
    while (philox && end < jobs.size() && jobs[end]->request.sampling.rng == Rng::kPhilox) ++end;
    const StepState part = narrow(s, static_cast<int64_t>(begin), static_cast<int64_t>(end - begin));
    if (philox) {
      sample_plain(logits, part);
    } else {
      const Tensor token =
          at::multinomial(call_sampling_probs(logits, part), 1, /*replacement=*/false, jobs[begin]->generator);
      Tensor tokens = part.tokens, seen = part.seen;
      tokens.copy_(token.view({1}));
      seen.scatter_(1, token, 1);
    }
    begin = end;
  }
}

void advance(const StepState& state, int64_t last_position) {
  Tensor positions = state.positions, step = state.step, seqlens = state.seqlens;
  // A request that has met its stop token runs on until the host has read it: never past the table of positions.
  positions.add_(state.advance).clamp_max_(last_position);
  step.add_(state.advance);
  seqlens.add_(state.row_advance);
}

}  // namespace vivace
