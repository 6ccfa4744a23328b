// Counters of an engine since it started.
#pragma once

#include <cstdint>
#include <string>

namespace vivace {

struct Stats {
  std::string device;       // "cpu", "cuda:0"
  std::string device_name;  // "NVIDIA H200"; empty for a CPU
  std::string dtype;        // of the weights: "bfloat16"

  int64_t queued = 0, running = 0;                                 // now
  int64_t submitted = 0, finished = 0, cancelled = 0, failed = 0;  // so far; finished counts stop and length
  int64_t prompt_tokens = 0;                                       // positions prefilled, rows counted singly
  int64_t prompt_tokens_reused = 0;                                // of them, copied from earlier prompts of their voice
  int64_t generated_tokens = 0;                                    // delivered
  int64_t decode_steps = 0, decode_rows = 0;                       // rows over all steps: rows / steps is the mean batch
  int64_t graph_replays = 0, graph_captures = 0, eager_steps = 0;  // decode steps by how they ran
  int64_t fused_steps = 0;                         // of them, through vivace::decode_step; the others went layer by layer
  std::string not_fused;                           // why none can; empty where some can
  double prefill_seconds = 0, decode_seconds = 0;  // host's clock; on CUDA issue and wait, not kernels

  double load_seconds = 0, warm_up_seconds = 0;  // before the first request: weights; kernels and graphs

  int64_t weight_bytes = 0, cache_bytes = 0, workspace_bytes = 0;
  int64_t peak_memory_bytes = 0;    // CUDA: torch's peak on the device; CPU: the process' peak resident size
  int64_t device_memory_bytes = 0;  // CUDA: in use on the whole device now, other processes included
};

}  // namespace vivace
