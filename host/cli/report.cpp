#include "host/cli/report.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace vivace::cli {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string bytes_text(int64_t bytes) {
  const double mib = static_cast<double>(bytes) / (1 << 20);
  return mib < 1024 ? fmt::format("{:.0f} MiB", mib) : fmt::format("{:.2f} GiB", mib / 1024);
}

}  // namespace

ProgressBar::ProgressBar(int64_t requests, int64_t max_tokens, bool enabled)
    : requests_(requests), max_tokens_(max_tokens), enabled_(enabled && isatty(STDERR_FILENO) == 1), started_(now()) {}

ProgressBar::~ProgressBar() { clear(); }

void ProgressBar::add_tokens(int64_t tokens) {
  const std::lock_guard lock(mutex_);
  tokens_ += tokens;
  if (now() - drawn_ > 0.1) draw();
}

void ProgressBar::finish_request() {
  const std::lock_guard lock(mutex_);
  ++finished_;
  draw();
}

void ProgressBar::draw() {
  if (!enabled_) return;
  drawn_ = now();
  const double rate = static_cast<double>(tokens_) / std::max(drawn_ - started_, 1e-9);
  std::string text =
      fmt::format(" {} tokens ({:.1f} s of speech), {:.0f} tokens/s", with_commas(tokens_), tokens_ / 25.0, rate);
  if (requests_ > 1) text += fmt::format(", {}/{} done", finished_, requests_);
  // Few texts need max_tokens, so the bar is of the most that can come.
  const int width = std::clamp(terminal_width() - static_cast<int>(text.size()) - 3, 0, 40);
  const int filled = static_cast<int>(std::min<int64_t>(tokens_ * width / std::max<int64_t>(max_tokens_, 1), width));
  fmt::print(stderr, "\r\x1b[K[{}{}]{}", std::string(static_cast<size_t>(filled), '#'),
             std::string(static_cast<size_t>(width - filled), '.'), text);
  std::fflush(stderr);
}

void ProgressBar::clear() {
  const std::lock_guard lock(mutex_);
  if (!enabled_ || drawn_ == 0) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  drawn_ = 0;
}

std::string with_commas(int64_t value) {
  const std::string digits = fmt::format("{}", value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    const size_t rest = digits.size() - i;
    if (i > 0 && rest % 3 == 0 && digits[i - 1] != '-') text += ',';
    text += digits[i];
  }
  return text;
}

nlohmann::ordered_json to_json(const Result& result, const std::string& model, const std::string& text,
                               const std::vector<int64_t>& text_tokens, const Request& request) {
  const SamplingOptions& s = request.sampling;
  // Floats as they were typed: 0.8, not 0.800000011920929.
  const auto number = [](float value) { return std::stod(fmt::format("{}", value)); };
  nlohmann::ordered_json json = {{"model", model},
                                 {"seed", s.seed},
                                 {"text", text},
                                 {"text_tokens", text_tokens},
                                 {"tokens", result.tokens},
                                 {"finish_reason", to_string(result.finish_reason)},
                                 {"prompt_tokens", result.prompt_tokens},
                                 {"seconds", result.seconds},
                                 {"queue_seconds", result.queue_seconds},
                                 {"time_to_first_token", result.time_to_first_token},
                                 {"tokens_per_second", result.tokens_per_second},
                                 {"sampling",
                                  {{"temperature", number(s.temperature)},
                                   {"top_p", number(s.top_p)},
                                   {"min_p", number(s.min_p)},
                                   {"top_k", s.top_k},
                                   {"repetition_penalty", number(s.repetition_penalty)},
                                   {"cfg_weight", number(s.cfg_weight)},
                                   {"exaggeration", number(request.exaggeration)},
                                   {"max_tokens", request.max_new_tokens},
                                   {"rng", s.rng == Rng::kPhilox ? "philox" : "torch"}}}};
  if (!result.detail.empty()) json["detail"] = result.detail;
  if (!result.error.empty()) json["error"] = result.error;
  return json;
}

nlohmann::ordered_json to_json(const Stats& s) {
  return {{"device", s.device},
          {"device_name", s.device_name},
          {"dtype", s.dtype},
          {"generated_tokens", s.generated_tokens},
          {"prompt_tokens", s.prompt_tokens},
          {"prompt_tokens_reused", s.prompt_tokens_reused},
          {"decode_steps", s.decode_steps},
          {"graph_replays", s.graph_replays},
          {"graph_captures", s.graph_captures},
          {"eager_steps", s.eager_steps},
          {"fused_steps", s.fused_steps},
          {"not_fused", s.not_fused},
          {"prefill_seconds", s.prefill_seconds},
          {"decode_seconds", s.decode_seconds},
          {"load_seconds", s.load_seconds},
          {"warm_up_seconds", s.warm_up_seconds},
          {"weight_bytes", s.weight_bytes},
          {"cache_bytes", s.cache_bytes},
          {"workspace_bytes", s.workspace_bytes},
          {"peak_memory_bytes", s.peak_memory_bytes},
          {"device_memory_bytes", s.device_memory_bytes}};
}

nlohmann::ordered_json run_json(const std::vector<Result>& results, double seconds) {
  nlohmann::ordered_json first = nlohmann::ordered_json::array();
  int64_t tokens = 0;
  for (const Result& result : results) {
    first.push_back(result.time_to_first_token);
    tokens += static_cast<int64_t>(result.tokens.size());
  }
  return {{"seconds", seconds}, {"time_to_first_token", first}, {"tokens", tokens}};
}

Stats since(const Stats& now, const Stats& start) {
  Stats s = now;
  for (int64_t Stats::*count :
       {&Stats::submitted, &Stats::finished, &Stats::cancelled, &Stats::failed, &Stats::prompt_tokens,
        &Stats::prompt_tokens_reused, &Stats::generated_tokens, &Stats::decode_steps, &Stats::decode_rows,
        &Stats::graph_replays, &Stats::eager_steps, &Stats::fused_steps}) {
    s.*count -= start.*count;
  }
  s.prefill_seconds -= start.prefill_seconds;
  s.decode_seconds -= start.decode_seconds;
  return s;
}

std::string summary(const std::vector<Result>& results, const Stats& stats, double seconds) {
  int64_t tokens = 0;
  double first = 0, rate = 0;
  int64_t started = 0;
  for (const Result& result : results) {
    tokens += static_cast<int64_t>(result.tokens.size());
    if (result.tokens.empty()) continue;
    ++started;
    first = started == 1 ? result.time_to_first_token : std::min(first, result.time_to_first_token);
    rate = result.tokens_per_second;
  }
  // One request: its own rate after the first token. Several: all tokens over the whole time.
  if (results.size() != 1 || rate == 0) rate = static_cast<double>(tokens) / std::max(seconds, 1e-9);
  std::string text = fmt::format("{} tokens ({:.1f} s of speech) in {:.2f} s", with_commas(tokens),
                                 static_cast<double>(tokens) / 25, seconds);
  if (results.size() > 1) text += fmt::format(", {} requests", results.size());
  text += fmt::format("\n{} tokens/s, {:.2f}x real time, first token after {:.0f} ms",
                      rate < 100 ? fmt::format("{:.1f}", rate) : with_commas(static_cast<int64_t>(rate + 0.5)), rate / 25,
                      first * 1e3);
  text += fmt::format("\nloaded in {:.2f} s", stats.load_seconds + stats.warm_up_seconds);
  if (stats.warm_up_seconds > 0.005) text += fmt::format(", of which {:.2f} s kernels and graphs", stats.warm_up_seconds);
  text += fmt::format("\nmemory {} at its peak (weights {}, KV cache {}); {} {}", bytes_text(stats.peak_memory_bytes),
                      bytes_text(stats.weight_bytes), bytes_text(stats.cache_bytes), stats.device, stats.dtype);
  if (stats.device != "cpu") {
    text += stats.fused_steps > 0
                ? fmt::format("; {} of {} steps fused", with_commas(stats.fused_steps), with_commas(stats.decode_steps))
                : fmt::format("; steps layer by layer: {}", stats.not_fused);
  }
  if (stats.graph_replays > 0) {
    text += fmt::format("; {} replayed CUDA graphs", with_commas(stats.graph_replays));
  }
  return text;
}

}  // namespace vivace::cli
