// The engine's worker: what its thread owns and does (engine.h tells how it meets the callers).
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "host/batch.h"
#include "host/cuda_graph.h"
#include "host/engine.h"
#include "host/kv_cache.h"
#include "host/model.h"
#include "host/readback.h"
#include "host/voice_cache.h"

namespace vivace {

/// condition_variable::wait in terms of wait_for: libstdc++ 12 gave the former a new symbol version (GLIBCXX_3.4.30), which
/// would keep the wheel from systems that manylinux_2_34 admits.
template <typename Condition>
void wait_until_true(std::condition_variable& variable, std::unique_lock<std::mutex>& lock, Condition condition) {
  while (!variable.wait_for(lock, std::chrono::hours(1), condition)) {
  }
}

inline double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

struct Engine::Worker {
  explicit Worker(const EngineOptions& o) : options(o) {}

  // ---- shared with the callers, under `mutex` ---------------------------------------------------------------------------
  EngineOptions options;
  mutable std::mutex mutex;
  std::condition_variable work, done;  // for the worker; for wait()
  std::unordered_map<uint64_t, JobPtr> jobs;
  std::deque<JobPtr> queue;
  uint64_t next_id = 1;
  bool stopping = false;
  Stats stats;
  Manifest manifest{};
  std::thread thread;

  // ---- the worker's own -------------------------------------------------------------------------------------------------
  /// Tokens that have been queued on the device and not yet read.
  struct Pending {
    std::vector<JobPtr> jobs;
    Readback tokens;
  };
  std::unique_ptr<Model> model;
  std::unique_ptr<KvCache> cache;
  std::unique_ptr<Batch> batch;
  std::unique_ptr<StepGraphs> graphs;         // null: every step eager
  std::unique_ptr<StepGraphs> prompt_graphs;  // prefills of one request, by positions and rows; null: all eager
  at::Tensor prompt_x;                        // (positions, hidden): what is new of the prompts, one after the other
  at::Tensor prompt_layout;                   // (7) int32: cu_seqlens (3), cache rows (2), positions that are there (2)
  at::Tensor workspace;                       // of decode_step, uint8
  int64_t fused_rows = 0;                     // rows of a step up to which decode_step takes it; 0: never
  int64_t fused_probe_rows = 0;               // likewise with probes
  StepFamily family = StepFamily::kAuto;
  std::vector<JobPtr> admitted;  // waiting for their prefill
  std::deque<Pending> pending;
  at::Tensor probes;  // (alignment heads, rows, 1, capacity) fp32 of decode steps; undefined without alignment heads
  VoiceCache voices;

  // worker.cpp
  /// The thread: loads, answers `ready`, steps until the engine stops.
  void main(std::promise<void>& ready);
  bool wait_for_work();
  void step();
  void decode();
  StepShape padded_shape(int64_t requests, int64_t rows, bool plain, bool aligned) const;
  at::Tensor run_step(const StepShape& shape);  // device work only: can be captured
  void deliver();
  void deliver_one();
  void retire();
  void fail(const std::vector<JobPtr>& failed, const std::string& error);
  void finish(Job& job, FinishReason reason);  // under `mutex`
  // load.cpp
  void load();
  void load_cache();
  void warm_up();
  // prefill.cpp
  struct Prompts;
  void warm_up_prompts();
  int64_t new_positions(const Job& job) const;
  void admit();
  void prefill();
  at::Tensor run_prompts(const Prompts& prompts, const std::optional<at::Tensor>& frames);
  at::Tensor prompt_step(int64_t positions, int64_t rows);
};

}  // namespace vivace
