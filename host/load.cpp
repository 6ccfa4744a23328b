// The worker's start: model, KV cache, and what the first requests would wait for otherwise.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <string_view>

#include "host/device.h"
#include "host/worker.h"

namespace vivace {
namespace {

constexpr const char* kOp = "engine";

/// A switch of the environment, 0 or 1; nothing where it is not set.
std::optional<bool> switch_of(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  const std::string_view text = value;
  check(text == "0" || text == "1", kOp, "the environment's ", name, " is ", printable(text), ", expected 0 or 1");
  return text == "1";
}

bool graphs_wanted(const EngineOptions& options) {
  return switch_of("VIVACE_CUDA_GRAPHS").value_or(true) && options.cuda_graphs;
}

/// Whether the layers' weights are stacked, so that decode_step can run.
bool fused_wanted(const EngineOptions& options, bool cuda) {
  const std::optional<bool> chosen = switch_of("VIVACE_FUSED_STEP");
  const std::string_view wanted = !chosen ? std::string_view(options.fused_step) : *chosen ? "on" : "off";
  return wanted == "on" || (wanted == "auto" && (cuda || options.deterministic));
}

std::string gib(int64_t bytes) {
  std::ostringstream text;
  text.precision(1);
  text << std::fixed << static_cast<double>(bytes) / (1 << 30) << " GiB";
  return text.str();
}

}  // namespace

void Engine::Worker::load() {
  const auto start = Clock::now();
  if (options.threads > 0) at::set_num_threads(options.threads);
  const bool with_graphs = graphs_wanted(options);
  const bool stacked = fused_wanted(options, resolve_device(options.device).is_cuda());
  model = std::make_unique<Model>(
      ModelOptions{options.model, options.operators, options.device, options.dtype, options.verify, stacked});
  manifest = model->manifest();
  if (model->device().is_cuda() && with_graphs) graphs = std::make_unique<StepGraphs>();
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
    const int64_t bytes = model->cache_bytes_per_position() * model->cache_pitch(options.capacity) * rows;
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

}  // namespace vivace
