// What `vivace generate` prints: progress, summary, JSON.
#pragma once

#include <cstdint>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>

#include "host/engine.h"

namespace vivace::cli {

/// A bar on stderr while it is a terminal; silent otherwise. Callable from any thread.
class ProgressBar {
 public:
  ProgressBar(int64_t requests, int64_t max_tokens, bool enabled);
  ~ProgressBar();
  void add_tokens(int64_t tokens);
  void finish_request();
  /// Removes the bar.
  void clear();

 private:
  void draw();
  const int64_t requests_, max_tokens_;
  const bool enabled_;
  std::mutex mutex_;
  int64_t tokens_ = 0, finished_ = 0;
  double started_, drawn_ = 0;
};

/// 2713 -> "2,713".
std::string with_commas(int64_t value);

/// One request's entry in the JSON output.
nlohmann::ordered_json to_json(const Result& result, const std::string& model, const std::string& text,
                               const std::vector<int64_t>& text_tokens, const Request& request);
nlohmann::ordered_json to_json(const Stats& stats);

/// One run of --repeat.
nlohmann::ordered_json run_json(const std::vector<Result>& results, double seconds);
/// What was counted after `start`; bytes and captured graphs are all there are.
Stats since(const Stats& now, const Stats& start);

/// The lines at the end: tokens, rate, time to first token, memory.
std::string summary(const std::vector<Result>& results, const Stats& stats, double seconds);

}  // namespace vivace::cli
