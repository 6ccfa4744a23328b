#include "host/worker.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string_view>
#include <utility>

#include "host/device.h"
#include "host/operators.h"
#include "host/sampler.h"

namespace vivace {
namespace {

constexpr const char* kOp = "engine";

bool graphs_wanted(const EngineOptions& options) {
  const char* flag = std::getenv("VIVACE_CUDA_GRAPHS");
  return options.cuda_graphs && (flag == nullptr || std::string_view(flag) != "0");
}

std::string gib(int64_t bytes) {
  std::ostringstream text;
  text.precision(1);
  text << std::fixed << static_cast<double>(bytes) / (1 << 30) << " GiB";
  return text.str();
}

}  // namespace

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
    stream.emplace(resolve_device(options.device));
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
  voices.clear();
  probes = at::Tensor();
  batch.reset();
  cache.reset();
  model.reset();
}

void Engine::Worker::load() {
  if (options.threads > 0) at::set_num_threads(options.threads);
  model =
      std::make_unique<Model>(ModelOptions{options.model, options.operators, options.device, options.dtype, options.verify});
  manifest = model->manifest();

  const int64_t bytes = model->cache_bytes_per_position() * options.capacity * (options.max_rows + 1);
  const int64_t available = free_memory(model->device());
  check(bytes <= available, kOp, "the KV cache needs ", gib(bytes), " (", options.max_rows + 1, " rows of ",
        options.capacity, " positions, ", model->cache_bytes_per_position(), " bytes each), ", model->device().str(),
        " has ", gib(available), " free; lower capacity or max_requests");
  auto [k, v] = model->new_cache(options.max_rows + 1, options.capacity);
  cache = std::make_unique<KvCache>(std::move(k), std::move(v));
  batch = std::make_unique<Batch>(manifest, options.max_requests, cache->scratch_row(), model->device());
  if (const auto heads = static_cast<int64_t>(manifest.alignment_heads.size()); heads > 0) {
    probes = at::zeros({heads, 2 * options.max_requests, 1, options.capacity},
                       at::TensorOptions().dtype(at::kFloat).device(model->device()));
  }
  if (model->device().is_cuda() && graphs_wanted(options)) graphs = std::make_unique<StepGraphs>();

  const std::lock_guard lock(mutex);
  stats.device = model->device().str();
  stats.device_name = device_name(model->device());
  stats.dtype = to_string(model->dtype() == at::kFloat  ? Manifest::Dtype::kFloat32
                          : model->dtype() == at::kHalf ? Manifest::Dtype::kFloat16
                                                        : Manifest::Dtype::kBFloat16);
  stats.weight_bytes = model->weight_bytes();
  stats.cache_bytes = cache->bytes();
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

void Engine::Worker::admit() {
  const std::lock_guard lock(mutex);
  int64_t positions = 0;
  while (!queue.empty()) {
    const JobPtr job = queue.front();
    const int64_t rows = job->guided() ? 2 : 1;
    job->prompt_tokens = required_capacity(manifest, job->request) - job->request.max_new_tokens;
    positions += rows * job->prompt_tokens;
    const int64_t requests = batch->size() + static_cast<int64_t>(admitted.size());
    if (requests >= options.max_requests || rows > cache->free_rows()) break;
    if (positions > options.max_prefill && !admitted.empty()) break;
    queue.pop_front();
    job->cond_row = cache->take();
    if (job->guided()) job->uncond_row = cache->take();
    job->admitted = Clock::now();
    job->last_token = manifest.speech.start_token;
    job->result.status = Status::kRunning;
    job->result.prompt_tokens = job->prompt_tokens;
    --stats.queued;
    ++stats.running;
    admitted.push_back(job);
  }
}

at::Tensor Engine::Worker::voice_embedding(const Request& request) {
  std::erase_if(voices, [](const VoiceEmbedding& v) { return v.voice.expired(); });
  for (const VoiceEmbedding& v : voices) {
    if (v.voice.lock() == request.voice && v.exaggeration == request.exaggeration) return v.embedding;
  }
  voices.push_back({request.voice, request.exaggeration, model->encode_voice(*request.voice, request.exaggeration)});
  return voices.back().embedding;
}

/// All admitted prompts in one ragged forward: conditional rows first, then the unconditional ones, as in the batch.
void Engine::Worker::prefill() {
  if (admitted.empty()) return;
  const auto start = Clock::now();
  const at::Device device = model->device();
  const int64_t first = batch->size(), requests = static_cast<int64_t>(admitted.size());
  bool plain = true, aligned = false;
  std::vector<at::Tensor> prompts, unguided;
  std::vector<int32_t> cu_seqlens{0}, cache_rows;
  std::vector<int32_t> uncond_rows;
  at::Tensor logit_rows = at::empty({requests, 2}, at::kInt);
  int64_t max_seqlen = 0;
  for (int64_t r = 0; r < requests; ++r) {
    Job& job = *admitted[static_cast<size_t>(r)];
    Request& request = job.request;
    if (request.alignment && !manifest.alignment_heads.empty()) {
      job.alignment.emplace(static_cast<int64_t>(request.text_tokens.size()));
    }
    if (request.sampling.rng == Rng::kTorch) {
      job.generator = at::globalContext().defaultGenerator(device).clone();
      job.generator.set_current_seed(static_cast<uint64_t>(request.sampling.seed));
    }
    plain = plain && job.plain();
    aligned = aligned || job.alignment.has_value();
    const at::Tensor voice = voice_embedding(request);
    prompts.push_back(model->embed_prompt(voice, request.text_tokens, /*drop_text=*/false));
    cache_rows.push_back(job.cond_row);
    logit_rows[r][0] = r;
    logit_rows[r][1] = -1;
    if (job.guided()) {
      logit_rows[r][1] = requests + static_cast<int64_t>(unguided.size());
      unguided.push_back(model->embed_prompt(voice, request.text_tokens, /*drop_text=*/true));
      uncond_rows.push_back(job.uncond_row);
    }
    check(prompts.back().size(0) == job.prompt_tokens, kOp, "the model made a prompt of ", prompts.back().size(0),
          " positions, its manifest says ", job.prompt_tokens);
    max_seqlen = std::max(max_seqlen, job.prompt_tokens);
  }
  prompts.insert(prompts.end(), unguided.begin(), unguided.end());
  cache_rows.insert(cache_rows.end(), uncond_rows.begin(), uncond_rows.end());
  for (const at::Tensor& prompt : prompts) cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(prompt.size(0)));
  const int64_t rows = static_cast<int64_t>(prompts.size());

  const auto cu = at::tensor(at::ArrayRef<int32_t>(cu_seqlens), at::kInt).to(device);  // (rows + 1)
  std::optional<at::Tensor> frames;  // (heads, rows, 2, capacity): the two start-of-speech positions
  if (aligned) frames = at::zeros({probes.size(0), rows, 2, cache->capacity()}, probes.options());
  const at::Tensor hidden =
      model->forward(at::cat(prompts), cache->k(), cache->v(), at::zeros({rows}, cu.options()),
                     at::tensor(at::ArrayRef<int32_t>(cache_rows), at::kInt).to(device), cu, max_seqlen, frames);
  const at::Tensor logits = model->logits(hidden.index_select(0, cu.narrow(0, 1, rows) - 1));  // (rows, vocab)

  for (const JobPtr& job : admitted) batch->add(job);
  const std::vector<JobPtr> started = std::move(admitted);
  admitted.clear();
  batch->upload();
  StepState state = batch->state(first, requests, 0);
  state.logit_rows = logit_rows.to(device);
  if (plain) {
    sample_plain(logits, state);
  } else {
    sample_any(logits, state, logit_rows, started, frames, manifest);
  }
  for (const JobPtr& job : started) job->issued = 1;
  batch->touch();
  pending.push_back({started, Readback(state.tokens)});

  const std::lock_guard lock(mutex);
  stats.prompt_tokens += cu_seqlens.back();
  stats.prefill_seconds += seconds_between(start, Clock::now());
}

void Engine::Worker::decode() {
  // Requests whose last token has been queued wait outside the batch for its arrival.
  for (int64_t i = batch->size() - 1; i >= 0; --i) {
    if (batch->jobs()[static_cast<size_t>(i)]->exhausted()) batch->remove(i);
  }
  if (batch->empty()) return;
  const auto start = Clock::now();
  const bool plain = batch->plain(), aligned = batch->aligned();
  // Graphs are captured for few shapes, so a step is padded to one; the padding rows write to the scratch row.
  const int64_t n = graphs ? padded_requests(batch->size(), options.max_requests) : batch->size();
  const int64_t m = !graphs ? batch->rows() : batch->rows() == batch->size() ? n : 2 * n;
  const StepShape shape{n, m, plain, aligned};
  // An analyzer needs the last token before the next is sampled, and a capture should not keep arrived tokens waiting.
  if (aligned || (graphs && !graphs->ready(shape))) {
    while (!pending.empty()) deliver_one();
    const auto ended = [](const JobPtr& job) { return job->done; };
    if (std::any_of(batch->jobs().begin(), batch->jobs().end(), ended)) return decode();
  }

  batch->upload();
  const StepState state = batch->state(0, n, m);
  std::optional<at::Tensor> frames;
  if (aligned) frames = probes.narrow(1, 0, m);
  const int64_t last_position = manifest.speech.max_tokens;
  const auto run = [&] {
    at::Tensor logits = model->decode(state.tokens, state.positions, state.row_request, cache->k(), cache->v(),
                                      state.seqlens, state.cache_rows, frames);
    if (plain) {
      sample_plain(logits, state);
      advance(state, last_position);
    }
    return logits;
  };
  const at::Tensor logits = graphs ? graphs->run(shape, run) : run();
  const int64_t size = batch->size();
  if (!plain) {
    sample_any(logits, batch->state(0, size, m), batch->state(0, size, m).logit_rows.cpu(), batch->jobs(), frames, manifest);
    advance(state, last_position);
  }
  for (const JobPtr& job : batch->jobs()) ++job->issued;
  pending.push_back({batch->jobs(), Readback(state.tokens.narrow(0, 0, size))});

  const std::lock_guard lock(mutex);
  ++stats.decode_steps;
  stats.decode_rows += batch->rows();
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
      if (tokens[i] == manifest.speech.stop_token) {
        reason = FinishReason::kStop;
      } else {
        generated.push_back(tokens[i]);
        ++stats.generated_tokens;
        if (static_cast<int64_t>(generated.size()) >= job.request.max_new_tokens) reason = FinishReason::kLength;
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
