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

  // ---- shared with the callers, under `mutex`
  // -------------------------------------------------------------------------------------
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
  std::unique_ptr<StepGraphs> graphs;  // null: every step eager
  std::vector<JobPtr> admitted;        // waiting for their prefill
  std::deque<Pending> pending;
  at::Tensor probes;  // (alignment heads, rows, 1, capacity) fp32 of decode steps; undefined without alignment heads
  struct VoiceEmbedding {
    std::weak_ptr<const Voice> voice;
    float exaggeration;
    at::Tensor embedding;  // (length, hidden)
  };
  std::vector<VoiceEmbedding> voices;  // of voices that some request still holds

  /// The thread: loads, answers `ready`, steps until the engine stops.
  void main(std::promise<void>& ready);
  void load();
  bool wait_for_work();
  void step();
  void admit();
  void prefill();
  void decode();
  void deliver();
  void deliver_one();
  void retire();
  void fail(const std::vector<JobPtr>& failed, const std::string& error);
  void finish(Job& job, FinishReason reason);  // under `mutex`
  at::Tensor voice_embedding(const Request& request);
};

}  // namespace vivace
