// What is asked of the engine, and what it answers. No torch here.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "host/voice.h"

namespace vivace {

enum class Rng {
  kPhilox,  // counter-based (kernels/common/philox.h): the draws depend on seed and step alone, on any device, in any batch
  kTorch,   // at::multinomial with a torch generator seeded with `seed`: Chatterbox's tokens after torch.manual_seed(seed)
};

/// Chatterbox's sampling options, in the order in which they act.
struct SamplingOptions {
  float cfg_weight = 0.5f;          // classifier-free guidance, >= 0; 0 runs one row instead of two
  float repetition_penalty = 1.2f;  // > 0; 1: none
  float temperature = 0.8f;         // >= 0; 0: the likeliest token
  int32_t top_k = 0;                // >= 0; 0: all
  float min_p = 0.05f;              // in [0, 1]
  float top_p = 1.0f;               // in (0, 1]
  int64_t seed = 0;
  Rng rng = Rng::kPhilox;
  std::string generator_state;  // of Rng::kTorch: the bytes of torch.Generator.get_state() to go on from, instead of `seed`
};

/// What a callback is told, on the engine's thread.
struct Progress {
  uint64_t id;
  std::span<const int64_t> new_tokens;  // since the last call
  int64_t tokens;                       // generated so far, the new ones included
  int64_t max_new_tokens;
  double seconds;  // since the request was submitted
};

/// Streaming, progress and cancellation in one: returning false ends the request with what was generated. It runs on the
/// engine's thread and holds up every request while it does; it may call submit, poll, cancel and stats, not wait.
using TokenCallback = std::function<bool(const Progress&)>;

struct Request {
  std::vector<int64_t> text_tokens;    // the text's ids; start and stop tokens are added where they are missing
  std::shared_ptr<const Voice> voice;  // shared by any number of requests
  SamplingOptions sampling;
  float exaggeration = 0.5f;
  int64_t max_new_tokens = 1000;  // 25 tokens are a second of speech
  bool ignore_stop = false;       // the stop token ends nothing and stays in the result
  bool alignment = true;          // multilingual models: watch the alignment heads, as Chatterbox 0.1.7 does (alignment.h)
  TokenCallback on_tokens;
};

enum class Status { kQueued, kRunning, kFinished };
enum class FinishReason { kNone, kStop, kLength, kCancelled, kError };

/// "stop", "length", "cancelled", "error"; "" for kNone.
const char* to_string(FinishReason reason);

struct Result {
  uint64_t id = 0;
  Status status = Status::kQueued;
  FinishReason finish_reason = FinishReason::kNone;
  std::string error;            // of kError
  std::string detail;           // of kLength: what was reached, where it is not max_new_tokens
  std::vector<int64_t> tokens;  // speech tokens, without the stop token
  int64_t prompt_tokens = 0;    // positions in front of the first speech token
  double seconds = 0;           // from submission to the end
  double queue_seconds = 0;     // of these, before admission
  double time_to_first_token = 0;
  double tokens_per_second = 0;  // after the first token; 0 where there is no second
};

}  // namespace vivace
