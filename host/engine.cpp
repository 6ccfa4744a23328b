#include "host/engine.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <string>
#include <utility>

#include "host/device.h"
#include "host/worker.h"

namespace vivace {
namespace {

constexpr const char* kOp = "engine";

/// Text tokens as T3 wants them: framed by its start and stop tokens.
std::vector<int64_t> frame(const std::vector<int64_t>& text, const Manifest::Text& t) {
  std::vector<int64_t> framed;
  framed.reserve(text.size() + 2);
  if (text.empty() || text.front() != t.start_token) framed.push_back(t.start_token);
  framed.insert(framed.end(), text.begin(), text.end());
  if (framed.size() < 2 || framed.back() != t.stop_token) framed.push_back(t.stop_token);
  return framed;
}

void check_request(const Request& request, const Manifest& manifest, const EngineOptions& options) {
  const char* op = "submit";
  const SamplingOptions& s = request.sampling;
  auto within = [](float value, double low, double high) { return value >= low && value <= high; };  // false for NaN
  constexpr double kMax = 1e6;
  check(request.voice != nullptr, op, "the request has no voice");
  check(static_cast<int64_t>(request.voice->speaker_emb.size()) == manifest.conditioning.speaker_embed_size, op,
        "the voice has a speaker embedding of ", request.voice->speaker_emb.size(), ", the model expects ",
        manifest.conditioning.speaker_embed_size);
  check(within(s.temperature, 0, kMax), op, "temperature is ", s.temperature, ", expected at least 0");
  check(within(s.top_p, 0, 1) && s.top_p > 0, op, "top_p is ", s.top_p, ", expected above 0 and at most 1");
  check(within(s.min_p, 0, 1), op, "min_p is ", s.min_p, ", expected 0 to 1");
  check(s.top_k >= 0, op, "top_k is ", s.top_k, ", expected at least 0 (0: all)");
  check(within(s.repetition_penalty, 0, kMax) && s.repetition_penalty > 0, op, "repetition_penalty is ",
        s.repetition_penalty, ", expected above 0 (1: none)");
  check(within(s.cfg_weight, 0, kMax), op, "cfg_weight is ", s.cfg_weight, ", expected at least 0");
  check(within(request.exaggeration, -kMax, kMax), op, "exaggeration is ", request.exaggeration,
        ", expected a finite number");
  check(request.max_new_tokens >= 1 && request.max_new_tokens <= manifest.speech.max_tokens, op, "max_new_tokens is ",
        request.max_new_tokens, ", expected 1 to ", manifest.speech.max_tokens, " (the model's speech positions)");
  for (const int64_t token : request.text_tokens) {
    check(token >= 0 && token < manifest.text.vocab_size, op, "text_tokens has ", token, ", the vocabulary has ",
          manifest.text.vocab_size);
  }
  const int64_t text = static_cast<int64_t>(frame(request.text_tokens, manifest.text).size());
  check(text <= manifest.text.max_tokens, op, "the text has ", text, " tokens with start and stop, the model takes at most ",
        manifest.text.max_tokens, "; split it into sentences");
  const int64_t needed = required_capacity(manifest, request), prompt = needed - request.max_new_tokens;
  check(prompt < options.capacity, op, "the prompt has ", prompt, " positions, the KV cache a capacity of ",
        options.capacity, ", which leaves no room for a token");
  check(needed <= manifest.model.max_positions, op, "the prompt and max_new_tokens make ", needed,
        " positions, the model has ", manifest.model.max_positions);
  const int64_t rows = s.cfg_weight > 0 ? 2 : 1;
  check(rows <= options.max_rows, op, "a request with cfg_weight ", s.cfg_weight, " needs ", rows,
        " rows of the KV cache, it has ", options.max_rows);
}

/// Seeded, or with the state that was given.
at::Generator torch_generator(const SamplingOptions& sampling, at::Device device) {
  at::Generator generator = at::globalContext().defaultGenerator(device).clone();
  if (sampling.generator_state.empty()) {
    generator.set_current_seed(static_cast<uint64_t>(sampling.seed));
    return generator;
  }
  const at::Tensor state = at::empty({static_cast<int64_t>(sampling.generator_state.size())}, at::kByte);
  std::copy(sampling.generator_state.begin(), sampling.generator_state.end(), state.mutable_data_ptr<uint8_t>());
  try {
    generator.set_state(state);
  } catch (const std::exception& error) {
    throw Error("vivace.submit: generator_state is no state of a generator of " + device.str() + ": " + brief(error));
  }
  return generator;
}

}  // namespace

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled: return "cancelled";
    case FinishReason::kError: return "error";
    case FinishReason::kNone: break;
  }
  return "";
}

int64_t required_capacity(const Manifest& manifest, const Request& request) {
  const auto text = static_cast<int64_t>(frame(request.text_tokens, manifest.text).size());
  return manifest.conditioning.length + text + 2 + request.max_new_tokens;
}

Engine::Engine(const EngineOptions& options) : worker_(std::make_unique<Worker>(options)) {
  EngineOptions& o = worker_->options;
  check(o.max_requests >= 1, kOp, "max_requests is ", o.max_requests, ", expected at least 1");
  check(o.max_rows >= 0, kOp, "max_rows is ", o.max_rows, ", expected at least 1 (0: two for each request)");
  check(o.fused_step == "auto" || o.fused_step == "on" || o.fused_step == "off", kOp, "fused_step is ",
        printable(o.fused_step), ", expected auto, on or off");
  check(o.capacity >= 1, kOp, "capacity is ", o.capacity, ", expected at least 1");
  check(o.max_queue >= 1, kOp, "max_queue is ", o.max_queue, ", expected at least 1");
  if (o.max_rows == 0) o.max_rows = 2 * o.max_requests;
  std::promise<void> ready;
  worker_->thread = std::thread([this, &ready] { worker_->main(ready); });
  try {
    ready.get_future().get();
  } catch (...) {
    worker_->thread.join();
    throw;
  }
}

Engine::~Engine() {
  {
    const std::lock_guard lock(worker_->mutex);
    worker_->stopping = true;
  }
  worker_->work.notify_all();
  worker_->thread.join();
}

uint64_t Engine::submit(Request request) {
  Worker& w = *worker_;
  check_request(request, w.manifest, w.options);
  auto job = std::make_shared<Job>();
  request.text_tokens = frame(request.text_tokens, w.manifest.text);
  job->prompt_tokens = required_capacity(w.manifest, request) - request.max_new_tokens;
  job->limit = std::min(request.max_new_tokens, w.options.capacity - job->prompt_tokens);
  if (request.sampling.rng == Rng::kTorch) job->generator = torch_generator(request.sampling, w.model->device());
  job->request = std::move(request);
  job->submitted = Clock::now();
  uint64_t id = 0;
  {
    const std::lock_guard lock(w.mutex);
    if (static_cast<int64_t>(w.queue.size()) >= w.options.max_queue) {
      throw QueueFull("vivace.submit: the queue is full: " + std::to_string(w.queue.size()) + " requests wait (max_queue)");
    }
    id = w.next_id++;
    job->result.id = id;
    w.jobs.emplace(id, job);
    w.queue.push_back(std::move(job));
    ++w.stats.submitted;
    ++w.stats.queued;
  }
  w.work.notify_one();
  return id;
}

Result Engine::poll(uint64_t id) { return wait(id, 0); }

Result Engine::wait(uint64_t id, double timeout_seconds) {
  Worker& w = *worker_;
  std::unique_lock lock(w.mutex);
  const auto found = w.jobs.find(id);
  check(found != w.jobs.end(), "wait", "there is no request ", id, "; a finished result is handed out once");
  const JobPtr job = found->second;
  const auto finished = [&] { return job->result.status == Status::kFinished; };
  if (timeout_seconds < 0) {
    wait_until_true(w.done, lock, finished);
  } else {
    w.done.wait_for(lock, std::chrono::duration<double>(timeout_seconds), finished);
  }
  if (!finished()) return job->result;
  if (w.jobs.erase(id) == 0)
    throw Error("vivace.wait: the result of request " + std::to_string(id) + " was handed out meanwhile");
  return job->result;
}

bool Engine::cancel(uint64_t id) {
  Worker& w = *worker_;
  const std::lock_guard lock(w.mutex);
  const auto found = w.jobs.find(id);
  if (found == w.jobs.end() || found->second->result.status == Status::kFinished) return false;
  Job& job = *found->second;
  job.cancel = true;
  if (job.result.status == Status::kQueued) {
    std::erase_if(w.queue, [&](const JobPtr& queued) { return queued.get() == &job; });
    w.finish(job, FinishReason::kCancelled);
  }
  return true;
}

Stats Engine::stats() const {
  const std::lock_guard lock(worker_->mutex);
  Stats stats = worker_->stats;
  stats.peak_memory_bytes = peak_memory(c10::Device(stats.device));
  stats.device_memory_bytes = used_memory(c10::Device(stats.device));
  return stats;
}

const Manifest& Engine::manifest() const { return worker_->manifest; }

}  // namespace vivace
