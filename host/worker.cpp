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

/// Whether the layers' weights are stacked, so that decode_step can run.
bool fused_wanted(const EngineOptions& options, bool cuda) {
  const char* flag = std::getenv("VIVACE_FUSED_STEP");
  const std::string_view wanted = flag == nullptr || *flag == '\0' ? std::string_view(options.fused_step)
                                  : std::string_view(flag) == "0"  ? "off"
                                                                   : "on";
  return wanted == "on" || (wanted == "auto" && (cuda || options.deterministic));
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

void Engine::Worker::load() {
  const auto start = Clock::now();
  if (options.threads > 0) at::set_num_threads(options.threads);
  const bool stacked = fused_wanted(options, resolve_device(options.device).is_cuda());
  model = std::make_unique<Model>(
      ModelOptions{options.model, options.operators, options.device, options.dtype, options.verify, stacked});
  manifest = model->manifest();
  if (model->device().is_cuda() && graphs_wanted(options)) graphs = std::make_unique<StepGraphs>();
  load_cache();
  batch = std::make_unique<Batch>(manifest, options.max_requests, cache->scratch_row(), model->device());
  if (const auto heads = static_cast<int64_t>(manifest.alignment_heads.size()); heads > 0) {
    probes = at::zeros({heads, 2 * options.max_requests, 1, options.capacity},
                       at::TensorOptions().dtype(at::kFloat).device(model->device()));
  }
  if (graphs) {
    prompt_graphs = std::make_unique<StepGraphs>();
  }
  synchronize(model->device());
  const auto loaded = Clock::now();
  warm_up();

  const std::lock_guard lock(mutex);
  stats.load_seconds = seconds_between(start, loaded);
  stats.warm_up_seconds = seconds_between(loaded, Clock::now());
  stats.device = model->device().str();
  stats.device_name = device_name(model->device());
  stats.dtype = to_string(model->dtype() == at::kFloat  ? Manifest::Dtype::kFloat32
                          : model->dtype() == at::kHalf ? Manifest::Dtype::kFloat16
                                                        : Manifest::Dtype::kBFloat16);
  stats.weight_bytes = model->weight_bytes();
  stats.cache_bytes = cache->bytes();
  stats.workspace_bytes = workspace.defined() ? static_cast<int64_t>(workspace.nbytes()) : 0;
  stats.graph_captures = graphs ? graphs->captures() : 0;
  if (fused_rows == 0) {
    stats.not_fused = !stacked                      ? "it is turned off"
                      : model->decoder() == nullptr ? "the model is built otherwise: " + model->not_stacked()
                                                    : "no kernel of " + stats.device + " takes the model in " + stats.dtype;
  }
}

/// The KV cache and what decode_step needs. Steps that go layer by layer, in graphs, are padded with rows that write to a
/// cache row of their own; decode_step skips padding, and needs none.
void Engine::Worker::load_cache() {
  const auto allocate = [&](bool scratch) {
    const int64_t rows = options.max_rows + (scratch ? 1 : 0);
    const int64_t bytes = model->cache_bytes_per_position() * options.capacity * rows;
    const int64_t available = free_memory(model->device());
    check(bytes <= available, kOp, "the KV cache needs ", gib(bytes), " (", rows, " rows of ", options.capacity,
          " positions, ", model->cache_bytes_per_position(), " bytes each), ", model->device().str(), " has ",
          gib(available), " free; lower capacity or max_requests");
    auto [k, v] = model->new_cache(rows, options.capacity);
    cache = std::make_unique<KvCache>(std::move(k), std::move(v), scratch);
  };
  const Decoder* const decoder = model->decoder();
  // The learned rotary table may be shorter than the cache; then only the module, which looks positions up, can run.
  if (decoder != nullptr && options.capacity <= manifest.model.max_positions) {
    allocate(/*scratch=*/false);
    const int64_t most = 2 * options.max_requests;
    const auto largest = [&](bool with_probes) {
      int64_t rows = most;
      while (rows > 0 && decoder->workspace(cache->k(), rows, with_probes, family) < 0)
        rows = rows > 8 ? rows - 8 : rows - 1;
      return rows;
    };
    if (options.deterministic && model->device().is_cuda()) {
      family = StepFamily::kChain;
      if (decoder->workspace(cache->k(), most, false, family) < 0) family = StepFamily::kPersistent;
    }
    fused_rows = largest(false);
    if (!manifest.alignment_heads.empty()) fused_probe_rows = largest(true);
    int64_t bytes = 0;
    for (int64_t rows = 1; rows <= fused_rows; ++rows) {
      bytes = std::max(bytes, decoder->workspace(cache->k(), rows, false, family));
    }
    if (fused_rows > 0) workspace = at::zeros({bytes}, at::TensorOptions().dtype(at::kByte).device(model->device()));
    check(!options.deterministic || fused_rows == most, kOp, "deterministic: no one family of decode_step's kernels takes ",
          most, " rows of this model on ", model->device().str());
    if (fused_rows > 0) return;
    cache.reset();
  }
  check(!options.deterministic, kOp, "deterministic: the model cannot run through decode_step",
        decoder == nullptr ? ": " + model->not_stacked() : "");
  allocate(/*scratch=*/graphs != nullptr);
}

/// What the first requests would wait for otherwise: libraries' handles, kernels that are loaded when they first run,
/// graphs.
void Engine::Worker::warm_up() {
  const at::Device device = model->device();
  if (!device.is_cuda() || !options.warm_up) return;
  batch->upload();  // padding alone

  const auto prepare = [&](const StepShape& shape) {
    if (!shape.fused && cache->scratch_row() < 0) return;  // layer by layer there is no padding then
    const auto step = [&] { return run_step(shape); };
    if (graphs) {
      graphs->prepare(shape, step);
    } else {
      step();
    }
  };
  for (int64_t n = 1; n <= options.max_requests; ++n) {
    if (padded_requests(n, options.max_requests) != n) continue;
    for (const int64_t m : {n, 2 * n}) {
      if (m > n && options.max_rows < 2) continue;
      const StepShape shape = padded_shape(n, m, /*plain=*/true, /*aligned=*/false);
      if (shape.fused || n == 1) prepare(shape);  // layer by layer a graph takes long to capture: when it is needed
    }
  }
  const int64_t rows = std::min<int64_t>(options.max_rows, 2);
  if (probes.defined()) prepare(padded_shape(1, rows, /*plain=*/false, /*aligned=*/true));
  warm_up_prompts();
  release_memory(device);  // what eager runs took

  // Whole requests, through everything that they pass: a prompt's embedding, staging memory, events.
  const Stats before = stats;
  auto voice = std::make_shared<Voice>();
  voice->speaker_emb.resize(static_cast<size_t>(manifest.conditioning.speaker_embed_size));
  voice->prompt_tokens.resize(static_cast<size_t>(manifest.conditioning.prompt_tokens));
  for (const int64_t text : {24, 112}) {
    Request request;
    request.text_tokens.resize(static_cast<size_t>(text), manifest.text.start_token);
    request.text_tokens.back() = manifest.text.stop_token;  // framed, as submit() leaves it
    request.voice = voice;
    request.sampling.cfg_weight = rows == 2 ? 0.5f : 0.0f;
    request.max_new_tokens = 3;
    request.ignore_stop = true;
    const auto job = std::make_shared<Job>();
    job->prompt_tokens = required_capacity(manifest, request) - request.max_new_tokens;
    if (job->prompt_tokens + request.max_new_tokens > options.capacity || text > manifest.text.max_tokens) break;
    job->limit = request.max_new_tokens;
    job->request = std::move(request);
    job->cond_row = cache->take();
    if (job->guided()) job->uncond_row = cache->take();
    admitted.push_back(job);
    while (!job->done) {
      prefill();
      decode();
      deliver();
      retire();
    }
  }
  while (!pending.empty()) deliver_one();
  synchronize(device);
  if (graphs) graphs->forget_runs();
  stats = before;
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
