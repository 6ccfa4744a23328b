// The worker's prefill: prompts of admitted requests, from text to first tokens.
#include <ATen/ATen.h>

#include <algorithm>
#include <map>

#include "host/device.h"
#include "host/sampler.h"
#include "host/worker.h"

namespace vivace {
namespace {

constexpr const char* kOp = "engine";

// What is new of the prompts of one request is padded to multiples of kPromptStep positions, each of which is a graph, up to
// kPromptGraphs.
constexpr int64_t kPromptStep = 32, kPromptGraphs = 256;

// On CUDA the products of larger prefills have few shapes, which are run when the engine starts: for each new one cuBLAS may
// choose a kernel that it has to load first, which takes milliseconds.
constexpr int64_t kPositionStep = 256, kRowStep = 32;

int64_t rounded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

/// What is computed of some prompts, one after the other: conditional rows first, then the unconditional ones, as in the
/// batch.
struct Engine::Worker::Prompts {
  std::vector<at::Tensor> x;              // (length, hidden) each
  std::vector<int32_t> cu_seqlens = {0};  // (rows + 1)
  std::vector<int32_t> cache_rows;
  std::vector<int32_t> seqlens;  // positions of each row that are in the cache already
  int64_t longest = 0;

  int64_t rows() const { return static_cast<int64_t>(x.size()); }
  int64_t positions() const { return cu_seqlens.back(); }
  void add(at::Tensor row, int32_t cache_row, int64_t seqlen) {
    longest = std::max(longest, row.size(0));
    cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(row.size(0)));
    cache_rows.push_back(cache_row);
    seqlens.push_back(static_cast<int32_t>(seqlen));
    x.push_back(std::move(row));
  }
};

/// Runs prefills of all the numbers of positions that there are, and captures the small ones of one and two rows.
void Engine::Worker::warm_up_prompts() {
  const at::Device device = model->device();
  const auto options_of = at::TensorOptions().dtype(model->dtype()).device(device);
  const int64_t hidden = manifest.model.hidden_size;
  const int64_t most = std::min(options.max_prefill, kPositionStep * options.max_requests);
  for (int64_t positions = kPositionStep; positions <= most; positions += kPositionStep) {
    Prompts prompts;  // of at least two rows, so that it is no graph
    for (int32_t row = 0; row < options.max_rows && prompts.positions() < positions; ++row) {
      const int64_t length = std::min({positions - prompts.positions(), options.capacity, positions / 4});
      prompts.add(at::zeros({length, hidden}, options_of), row, 0);
    }
    if (prompts.positions() == positions) run_prompts(prompts, std::nullopt);
  }
  for (int64_t rows = kRowStep; rows <= rounded(options.max_rows, kRowStep); rows += kRowStep) {
    model->logits(at::zeros({rows, hidden}, options_of));
  }
  if (!prompt_graphs) return;
  prompt_x = at::zeros({kPromptGraphs, hidden}, options_of);
  prompt_layout = at::zeros({7}, at::TensorOptions().dtype(at::kInt).device(device));
  for (int64_t positions = kPromptStep; positions <= kPromptGraphs; positions += kPromptStep) {
    for (int64_t rows = 1; rows <= std::min<int64_t>(options.max_rows, 2); ++rows) {
      if (positions > rows * options.capacity) continue;
      const auto end = static_cast<int32_t>(positions), middle = static_cast<int32_t>(rows == 1 ? positions : positions / 2);
      prompt_layout.copy_(upload(std::vector<int32_t>{0, middle, end, 0, 1, 0, 0}, device));
      prompt_graphs->prepare({positions, rows, /*sampled=*/false, /*probes=*/false, /*fused=*/false},
                             [&, positions, rows] { return prompt_step(positions, rows); });
    }
  }
}

/// Positions that a prefill of the request has to compute.
int64_t Engine::Worker::new_positions(const Job& job) const {
  const VoiceCache::Entry* voice = options.deterministic ? nullptr : voices.find(job.request);
  const auto left = [&](bool unconditional) {
    return job.prompt_tokens - (voice == nullptr ? 0 : voice->known(unconditional, job.prompt_tokens));
  };
  return left(false) + (job.guided() ? left(true) : 0);
}

void Engine::Worker::admit() {
  const std::lock_guard lock(mutex);
  int64_t positions = 0;
  while (!queue.empty()) {
    const JobPtr job = queue.front();
    const int64_t rows = job->guided() ? 2 : 1;
    positions += new_positions(*job);
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

/// The prompts through the model: the logits (rows, vocab) after each. Few positions of one or two rows, which is one
/// request, replay a graph: some 300 kernels of a few microseconds each would wait for the host otherwise.
at::Tensor Engine::Worker::run_prompts(const Prompts& prompts, const std::optional<at::Tensor>& frames) {
  const int64_t rows = prompts.rows();
  const int64_t positions = rounded(prompts.positions(), kPromptStep);
  if (!prompt_layout.defined() || frames || rows > 2 || positions > kPromptGraphs || positions > rows * cache->capacity()) {
    std::vector<at::Tensor> x = prompts.x;
    std::vector<int64_t> last(prompts.cu_seqlens.begin() + 1, prompts.cu_seqlens.end());  // positions
    for (int64_t& position : last) --position;
    if (model->device().is_cuda()) {
      const int64_t missing = rounded(prompts.positions(), kPositionStep) - prompts.positions();
      if (missing > 0) x.push_back(at::zeros({missing, x.front().size(1)}, x.front().options()));
      last.resize(static_cast<size_t>(rounded(rows, kRowStep)));
    }
    const at::Tensor hidden = model->forward(at::cat(x), cache->k(), cache->v(), upload(prompts.seqlens, model->device()),
                                             upload(prompts.cache_rows, model->device()),
                                             upload(prompts.cu_seqlens, model->device()), prompts.longest, frames);
    return model->logits(hidden.index_select(0, upload(last, model->device()))).narrow(0, 0, rows);
  }
  for (size_t i = 0; i < prompts.x.size(); ++i) {
    prompt_x.narrow(0, prompts.cu_seqlens[i], prompts.x[i].size(0)).copy_(prompts.x[i]);
  }
  std::vector<int32_t> layout(static_cast<size_t>(prompt_layout.numel()));
  std::copy(prompts.cu_seqlens.begin(), prompts.cu_seqlens.end(), layout.begin());
  std::copy(prompts.cache_rows.begin(), prompts.cache_rows.end(), layout.begin() + 3);
  std::copy(prompts.seqlens.begin(), prompts.seqlens.end(), layout.begin() + 5);
  prompt_layout.copy_(upload(layout, model->device()));
  return prompt_graphs->run({positions, rows, /*sampled=*/false, /*probes=*/false, /*fused=*/false},
                            [&, positions, rows] { return prompt_step(positions, rows); });
}

/// From prompt_x and prompt_layout to logits (rows, vocab): device work only. What lies behind the prompts is computed
/// along, and seen by none.
at::Tensor Engine::Worker::prompt_step(int64_t positions, int64_t rows) {
  const at::Tensor cu = prompt_layout.narrow(0, 0, rows + 1), cache_rows = prompt_layout.narrow(0, 3, rows);
  const at::Tensor hidden =
      model->forward(prompt_x.narrow(0, 0, positions), cache->k(), cache->v(), prompt_layout.narrow(0, 5, rows), cache_rows,
                     cu, std::min(positions, cache->capacity()), std::nullopt);
  return model->logits(hidden.index_select(0, cu.narrow(0, 1, rows) - 1));
}

/// All admitted prompts in one ragged forward; of those whose voice is known, only what differs from earlier ones.
void Engine::Worker::prefill() {
  if (admitted.empty()) return;
  const auto start = Clock::now();
  const at::Device device = model->device();
  const int64_t first = batch->size(), requests = static_cast<int64_t>(admitted.size());
  bool plain = true, aligned = false;
  Prompts prompts, unguided;
  std::vector<int32_t> logit_rows;  // (requests, 2)
  struct Known {                    // of a voice, and the rows to copy it to
    int64_t positions[2] = {0, 0};
    std::vector<int32_t> rows[2];  // conditional, unconditional
  };
  std::map<VoiceCache::Entry*, Known> voices_known;
  int64_t whole = 0;  // positions of all prompts
  for (int64_t r = 0; r < requests; ++r) {
    Job& job = *admitted[static_cast<size_t>(r)];
    Request& request = job.request;
    const int64_t length = job.prompt_tokens;
    if (request.alignment && !manifest.alignment_heads.empty()) {
      job.alignment.emplace(static_cast<int64_t>(request.text_tokens.size()));
    }
    plain = plain && job.plain();
    aligned = aligned || job.alignment.has_value();
    VoiceCache::Entry& voice = voices.of(request, *model);
    Known& known = voices_known[&voice];
    const auto skip = [&](bool unconditional, int32_t row) {
      const int64_t positions = options.deterministic ? 0 : voice.known(unconditional, length);
      if (positions > 0) known.rows[unconditional].push_back(row);
      known.positions[unconditional] = std::max(known.positions[unconditional], positions);
      return positions;
    };
    const at::Tensor x = model->embed_prompt(voice.embedding, request.text_tokens, /*drop_text=*/false);
    check(x.size(0) == length, kOp, "the model made a prompt of ", x.size(0), " positions, its manifest says ", length);
    const int64_t there = skip(false, job.cond_row);
    prompts.add(x.narrow(0, there, length - there), job.cond_row, there);
    logit_rows.push_back(static_cast<int32_t>(r));
    logit_rows.push_back(job.guided() ? static_cast<int32_t>(requests + unguided.rows()) : -1);
    whole += length;
    if (!job.guided()) continue;
    whole += length;
    const int64_t begin = skip(true, job.uncond_row);
    // Both rows end with the same two positions.
    const at::Tensor u =
        begin == length - 2 ? x : model->embed_prompt(voice.embedding, request.text_tokens, /*drop_text=*/true);
    unguided.add(u.narrow(0, begin, length - begin), job.uncond_row, begin);
  }
  for (size_t i = 0; i < unguided.x.size(); ++i) prompts.add(unguided.x[i], unguided.cache_rows[i], unguided.seqlens[i]);
  for (const auto& [voice, known] : voices_known) {
    for (const int i : {0, 1}) VoiceCache::copy(*voice, known.positions[i], known.rows[i], *cache);
  }

  std::optional<at::Tensor> frames;  // (heads, rows, 2, capacity): the two start-of-speech positions
  if (aligned) frames = at::zeros({probes.size(0), prompts.rows(), 2, cache->capacity()}, probes.options());
  const at::Tensor logits = run_prompts(prompts, frames);
  for (const JobPtr& job : admitted) {
    if (options.deterministic) break;
    VoiceCache::Entry& voice = voices.of(job->request, *model);
    if (job->guided()) {
      voices.keep(voice, job->prompt_tokens - 2, job->uncond_row, *cache);
    } else {
      voices.keep(voice, voice.embedding.size(0), job->cond_row, *cache);
    }
  }

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
  stats.prompt_tokens += whole;
  stats.prompt_tokens_reused += whole - prompts.positions();
  stats.prefill_seconds += seconds_between(start, Clock::now());
}

}  // namespace vivace
