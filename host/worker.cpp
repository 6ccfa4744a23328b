#include "host/worker.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <utility>

#include "host/device.h"
#include "host/operators.h"
#include "host/sampler.h"

namespace vivace {

/// One step: admit, prefill, decode, sample (at the end of both), deliver, retire.
void Engine::Worker::step() {
  admit();    // queue -> rows of the cache
  prefill();  // the prompts of the admitted, and their first tokens
  decode();   // one token for every request in the batch
  deliver();  // tokens that have arrived -> results and callbacks
  retire();   // finished requests leave the batch, their rows become free
}

void Engine::Worker::main(std::promise<void>& ready) {
  std::optional<StreamScope> stream;
  const c10::InferenceMode inference;
  try {
    load_operators(options.operators);
    const at::Device device = resolve_device(options.device);
    if (options.small_stack) shrink_stack(device);
    stream.emplace(device);
    load();
  } catch (...) {
    ready.set_exception(std::current_exception());
    return;
  }
  ready.set_value();
  while (wait_for_work()) {
    try {
      step();
    } catch (const std::exception& error) {
      // Whoever took part ends with the error; those in the queue get their chance.
      std::vector<JobPtr> failed = batch->jobs();
      for (const Pending& step : pending) failed.insert(failed.end(), step.jobs.begin(), step.jobs.end());
      failed.insert(failed.end(), admitted.begin(), admitted.end());
      admitted.clear();
      pending.clear();
      fail(failed, brief(error));
      retire();
    }
  }
  stream->synchronize();
  // CUDA memory goes while the stream is still current.
  pending.clear();
  graphs.reset();
  prompt_graphs.reset();
  voices.clear();
  probes = workspace = prompt_x = prompt_layout = at::Tensor();
  batch.reset();
  cache.reset();
  model.reset();
}

/// False when the engine is to stop; everything that was submitted has then been finished.
bool Engine::Worker::wait_for_work() {
  std::unique_lock lock(mutex);
  wait_until_true(work, lock, [&] { return stopping || !queue.empty() || !batch->empty() || !pending.empty(); });
  if (!stopping) return true;
  for (auto& [id, job] : jobs) {
    if (job->result.status != Status::kFinished) finish(*job, FinishReason::kCancelled);
  }
  queue.clear();
  return false;
}

/// The step that a batch of `requests` and `rows` runs as. Graphs are captured for few shapes, so it is padded to one.
StepShape Engine::Worker::padded_shape(int64_t requests, int64_t rows, bool plain, bool aligned) const {
  const int64_t n = graphs ? padded_requests(requests, options.max_requests) : requests;
  const int64_t m = !graphs ? rows : rows == requests ? n : 2 * n;
  const int64_t fused = aligned ? fused_probe_rows : fused_rows;
  if (m <= fused) return {n, m, plain, aligned, true};
  if (rows <= fused) return {requests, rows, plain, aligned, true};
  if (cache->scratch_row() < 0) return {requests, rows, plain, aligned, false};
  return {n, m, plain, aligned, false};
}

/// From the state of the batch to logits and, where the shape says so, to the next state.
at::Tensor Engine::Worker::run_step(const StepShape& shape) {
  const StepState s = batch->state(0, shape.requests, shape.rows);
  at::Tensor logits;  // (rows, vocab)
  if (shape.fused) {
    std::optional<at::Tensor> frames;
    if (shape.probes) frames = probes;
    logits = model->decoder()->step(s.tokens, s.positions, s.row_request, cache->k(), cache->v(), s.seqlens, s.cache_rows,
                                    workspace, frames, family);
  } else {
    std::optional<at::Tensor> frames;
    if (shape.probes) frames = probes.narrow(1, 0, shape.rows);
    logits = model->decode(s.tokens, s.positions, s.row_request, cache->k(), cache->v(), s.seqlens, s.cache_rows, frames);
  }
  if (shape.sampled) sample_step(logits, s, manifest.speech.max_tokens);
  return logits;
}

void Engine::Worker::decode() {
  // Requests whose last token has been queued wait outside the batch for its arrival.
  for (int64_t i = batch->size() - 1; i >= 0; --i) {
    if (batch->jobs()[static_cast<size_t>(i)]->exhausted()) batch->remove(i);
  }
  if (batch->empty()) return;
  const auto start = Clock::now();
  const bool plain = batch->plain(), aligned = batch->aligned();
  const StepShape shape = padded_shape(batch->size(), batch->rows(), plain, aligned);
  // An analyzer needs the last token before the next is sampled, and a capture should not keep arrived tokens waiting.
  if (aligned || (graphs && !graphs->ready(shape))) {
    while (!pending.empty()) deliver_one();
    const auto ended = [](const JobPtr& job) { return job->done; };
    if (std::any_of(batch->jobs().begin(), batch->jobs().end(), ended)) return decode();
  }

  batch->upload();
  const auto step = [&] { return run_step(shape); };
  const at::Tensor logits = graphs ? graphs->run(shape, step) : step();
  const int64_t size = batch->size();
  if (plain) {
    pending.push_back({batch->jobs(), Readback(batch->history(), batch->take_turns(), model->device())});
  } else {
    const StepState state = batch->state(0, size, shape.rows);
    std::optional<at::Tensor> frames;
    if (aligned) frames = probes.narrow(1, 0, shape.rows);
    sample_any(logits, state, state.logit_rows.cpu(), batch->jobs(), frames, manifest);
    advance(state, manifest.speech.max_tokens);
    pending.push_back({batch->jobs(), Readback(state.tokens)});
  }
  for (const JobPtr& job : batch->jobs()) ++job->issued;

  const std::lock_guard lock(mutex);
  ++stats.decode_steps;
  stats.decode_rows += batch->rows();
  stats.fused_steps += shape.fused ? 1 : 0;
  stats.eager_steps = graphs ? graphs->eager_steps() : stats.decode_steps;
  if (graphs) {
    stats.graph_replays = graphs->replays();
    stats.graph_captures = graphs->captures();
  }
  stats.decode_seconds += seconds_between(start, Clock::now());
}

/// On CUDA one step stays queued while the tokens of the step before it are read; on a CPU there is nothing to hide.
void Engine::Worker::deliver() {
  const auto start = Clock::now();
  const size_t ahead = model->device().is_cuda() && !batch->empty() ? 1 : 0;
  while (pending.size() > ahead) deliver_one();
  const std::lock_guard lock(mutex);
  stats.decode_seconds += seconds_between(start, Clock::now());
}

void Engine::Worker::deliver_one() {
  Pending step = std::move(pending.front());
  pending.pop_front();
  const std::vector<int64_t> tokens = step.tokens.read();
  const auto now = Clock::now();
  for (size_t i = 0; i < step.jobs.size(); ++i) {
    Job& job = *step.jobs[i];
    if (job.done) continue;  // it had ended while this step was in flight
    job.last_token = tokens[i];
    FinishReason reason = FinishReason::kNone;
    Progress progress{job.result.id, {}, 0, job.request.max_new_tokens, seconds_between(job.submitted, now)};
    {
      const std::lock_guard lock(mutex);
      std::vector<int64_t>& generated = job.result.tokens;
      if (generated.empty()) job.first_token = now;
      if (tokens[i] == manifest.speech.stop_token && !job.request.ignore_stop) {
        reason = FinishReason::kStop;
      } else {
        generated.push_back(tokens[i]);
        ++stats.generated_tokens;
        if (static_cast<int64_t>(generated.size()) >= job.limit) {
          reason = FinishReason::kLength;
          if (job.limit < job.request.max_new_tokens) {
            job.result.detail = "the KV cache is full: its capacity is " + std::to_string(options.capacity) +
                                " positions, of which the prompt took " + std::to_string(job.prompt_tokens);
          }
        }
        progress.new_tokens = {&tokens[i], 1};
      }
      progress.tokens = static_cast<int64_t>(generated.size());
    }
    if (job.request.on_tokens && !progress.new_tokens.empty()) {
      bool go_on = false;
      std::string error;
      try {
        go_on = job.request.on_tokens(progress);
      } catch (const std::exception& e) {
        error = e.what();
      }
      if (!error.empty()) {
        const std::lock_guard lock(mutex);
        job.result.error = "the callback failed: " + error;
        reason = FinishReason::kError;
      } else if (!go_on && reason == FinishReason::kNone) {
        reason = FinishReason::kCancelled;
      }
    }
    if (reason == FinishReason::kNone && job.cancel) reason = FinishReason::kCancelled;
    if (reason != FinishReason::kNone) {
      const std::lock_guard lock(mutex);
      finish(job, reason);
    }
  }
}

/// Rows go back to the cache at once: what is still queued for them runs before whatever is queued next.
void Engine::Worker::retire() {
  for (int64_t i = batch->size() - 1; i >= 0; --i) {
    if (batch->jobs()[static_cast<size_t>(i)]->done) batch->remove(i);
  }
}

void Engine::Worker::fail(const std::vector<JobPtr>& failed, const std::string& error) {
  const std::lock_guard lock(mutex);
  for (const JobPtr& job : failed) {
    if (job->done) continue;
    job->result.error = error;
    finish(*job, FinishReason::kError);
  }
}

void Engine::Worker::finish(Job& job, FinishReason reason) {
  const auto now = Clock::now();
  Result& result = job.result;
  const bool was_queued = result.status == Status::kQueued;
  result.status = Status::kFinished;
  result.finish_reason = reason;
  result.seconds = seconds_between(job.submitted, now);
  result.queue_seconds = seconds_between(job.submitted, was_queued ? now : job.admitted);
  if (!result.tokens.empty()) {
    result.time_to_first_token = seconds_between(job.submitted, job.first_token);
    const double rest = seconds_between(job.first_token, now);
    if (result.tokens.size() > 1 && rest > 0)
      result.tokens_per_second = static_cast<double>(result.tokens.size() - 1) / rest;
  }
  job.done = true;
  for (int32_t* row : {&job.cond_row, &job.uncond_row}) {
    if (*row >= 0) cache->give_back(std::exchange(*row, -1));
  }
  --(was_queued ? stats.queued : stats.running);
  ++(reason == FinishReason::kError ? stats.failed : reason == FinishReason::kCancelled ? stats.cancelled : stats.finished);
  done.notify_all();
}

}  // namespace vivace
