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

// Prompts of one request are padded to multiples of kPromptStep positions, each of which is a graph, up to kPromptGraphs.
constexpr int64_t kPromptStep = 32, kPromptGraphs = 256;

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
    prompt_x = at::zeros({2 * kPromptGraphs, manifest.model.hidden_size},
                         at::TensorOptions().dtype(model->dtype()).device(model->device()));
    prompt_layout = at::zeros({7}, at::TensorOptions().dtype(at::kInt).device(model->device()));
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
  for (int64_t length = kPromptStep; prompt_graphs && length <= std::min(kPromptGraphs, options.capacity);
       length += kPromptStep) {
    for (int64_t m = 1; m <= rows; ++m) warm_up_prompts(m, length);
  }
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

/// Captures a prefill of `rows` prompts of up to `length` positions.
void Engine::Worker::warm_up_prompts(int64_t rows, int64_t length) {
  std::vector<int32_t> layout(static_cast<size_t>(prompt_layout.numel()));
  for (int32_t row = 0; row < rows; ++row) {
    layout[static_cast<size_t>(row + 1)] = (row + 1) * static_cast<int32_t>(length);
    layout[static_cast<size_t>(row + 3)] = row;
  }
  prompt_layout.copy_(upload(layout, model->device()));
  prompt_graphs->prepare({length, rows, /*sampled=*/false, /*probes=*/false, /*fused=*/false},
                         [&, rows, length] { return prompt_step(rows, length); });
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
    positions += rows * job->prompt_tokens;
    const int64_t requests = batch->size() + static_cast<int64_t>(admitted.size());
    if (requests >= options.max_requests || rows > cache->free_rows()) break;
    if ((positions > options.max_prefill || options.deterministic) && !admitted.empty()) break;
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

/// Prompts (length, hidden) of cache rows through the model: the logits (rows, vocab) after each. cu_seqlens: where they
/// begin, one after the other. One or two short ones, which is one request, replay a graph: some 300 kernels of a few
/// microseconds each would wait for the host otherwise.
at::Tensor Engine::Worker::run_prompts(const std::vector<at::Tensor>& prompts, const std::vector<int32_t>& cu_seqlens,
                                       const std::vector<int32_t>& cache_rows, int64_t max_seqlen,
                                       const std::optional<at::Tensor>& frames) {
  const int64_t rows = static_cast<int64_t>(prompts.size());
  const int64_t length = (max_seqlen + kPromptStep - 1) / kPromptStep * kPromptStep;
  if (!prompt_graphs || frames || rows > 2 || length > kPromptGraphs || length > cache->capacity()) {
    const at::Tensor cu = upload(cu_seqlens, model->device());  // (rows + 1)
    const at::Tensor hidden = model->forward(at::cat(prompts), cache->k(), cache->v(), at::zeros({rows}, cu.options()),
                                             upload(cache_rows, model->device()), cu, max_seqlen, frames);
    return model->logits(hidden.index_select(0, cu.narrow(0, 1, rows) - 1));
  }
  for (size_t i = 0; i < prompts.size(); ++i) {
    prompt_x.narrow(0, cu_seqlens[i], prompts[i].size(0)).copy_(prompts[i]);
  }
  std::vector<int32_t> layout = cu_seqlens;
  layout.resize(3);
  layout.insert(layout.end(), cache_rows.begin(), cache_rows.end());
  layout.resize(static_cast<size_t>(prompt_layout.numel()));
  prompt_layout.copy_(upload(layout, model->device()));
  return prompt_graphs->run({length, rows, /*sampled=*/false, /*probes=*/false, /*fused=*/false},
                            [&, rows, length] { return prompt_step(rows, length); });
}

/// From prompt_x and prompt_layout to logits (rows, vocab): device work only. What lies behind the prompts is computed
/// along, and seen by none.
at::Tensor Engine::Worker::prompt_step(int64_t rows, int64_t length) {
  const at::Tensor cu = prompt_layout.narrow(0, 0, rows + 1), cache_rows = prompt_layout.narrow(0, 3, rows);
  const at::Tensor hidden = model->forward(prompt_x.narrow(0, 0, rows * length), cache->k(), cache->v(),
                                           prompt_layout.narrow(0, 5, rows), cache_rows, cu, length, std::nullopt);
  return model->logits(hidden.index_select(0, cu.narrow(0, 1, rows) - 1));
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
  std::vector<int32_t> logit_rows;  // (requests, 2)
  int64_t max_seqlen = 0;
  for (int64_t r = 0; r < requests; ++r) {
    Job& job = *admitted[static_cast<size_t>(r)];
    Request& request = job.request;
    if (request.alignment && !manifest.alignment_heads.empty()) {
      job.alignment.emplace(static_cast<int64_t>(request.text_tokens.size()));
    }
    plain = plain && job.plain();
    aligned = aligned || job.alignment.has_value();
    const at::Tensor voice = voice_embedding(request);
    prompts.push_back(model->embed_prompt(voice, request.text_tokens, /*drop_text=*/false));
    cache_rows.push_back(job.cond_row);
    logit_rows.push_back(static_cast<int32_t>(r));
    logit_rows.push_back(job.guided() ? static_cast<int32_t>(requests + static_cast<int64_t>(unguided.size())) : -1);
    if (job.guided()) {
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

  std::optional<at::Tensor> frames;  // (heads, rows, 2, capacity): the two start-of-speech positions
  if (aligned) frames = at::zeros({probes.size(0), rows, 2, cache->capacity()}, probes.options());
  const at::Tensor logits = run_prompts(prompts, cu_seqlens, cache_rows, max_seqlen, frames);

  for (const JobPtr& job : admitted) batch->add(job);
  const std::vector<JobPtr> started = std::move(admitted);
  admitted.clear();
  batch->upload();
  StepState state = batch->state(first, requests, 0);
  state.logit_rows = upload(logit_rows, device).view({requests, 2});
  if (plain) {
    sample_plain(logits, state);
  } else {
    sample_any(logits, state, at::tensor(at::ArrayRef<int32_t>(logit_rows), at::kInt).view({requests, 2}), started, frames,
               manifest);
  }
  for (const JobPtr& job : started) job->issued = 1;
  batch->touch();
  pending.push_back({started, Readback(state.tokens)});

  const std::lock_guard lock(mutex);
  stats.prompt_tokens += cu_seqlens.back();
  stats.prefill_seconds += seconds_between(start, Clock::now());
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
