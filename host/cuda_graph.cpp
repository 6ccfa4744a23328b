#include "host/cuda_graph.h"

#include <algorithm>
#include <bit>

#ifdef VIVACE_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>
#endif

namespace vivace {

int64_t padded_requests(int64_t n, int64_t limit) {
  const int64_t padded = n <= 8 ? static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n))) : (n + 3) / 4 * 4;
  return std::min(padded, std::max(n, limit));
}

#ifdef VIVACE_WITH_CUDA

struct StepGraphs::Graph {
  at::cuda::CUDAGraph graph;
  at::Tensor logits;  // of an unsampled shape; in the pool: held, so that no other graph's memory takes its place
  bool captured = false, refused = false;
};
struct StepGraphs::Pool {
  at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();
};

StepGraphs::StepGraphs() : pool_(std::make_unique<Pool>()) {}

bool StepGraphs::ready(const StepShape& shape) const {
  const auto found = graphs_.find(shape);
  return found != graphs_.end() && (found->second->captured || found->second->refused);
}

/// Nothing is executed by it. False, and never tried again, where the step cannot be captured.
bool StepGraphs::capture(const StepShape& shape, Graph& entry, const std::function<at::Tensor()>& step) {
  static std::mutex one_capture;  // the allocator allows one at a time in a process
  const std::lock_guard lock(one_capture);
  c10::cuda::getCurrentCUDAStream().synchronize();
  // Thread-local: another thread's synchronising calls do not end this capture.
  bool capturing = false;
  try {
    entry.graph.capture_begin(pool_->id, cudaStreamCaptureModeThreadLocal);
    capturing = true;
    at::Tensor logits = step();
    // What a graph leaves to the pool serves the next ones: they run one after another.
    if (!shape.sampled) entry.logits = std::move(logits);
    logits = at::Tensor();
    capturing = false;
    entry.graph.capture_end();
    entry.captured = true;
    ++captures_;
  } catch (const std::exception&) {
    if (capturing) {
      try {
        entry.graph.capture_end();
      } catch (const std::exception&) {  // an invalidated capture ends with an error of its own
      }
    }
    entry.logits = at::Tensor();
    entry.refused = true;
    (void)cudaGetLastError();
  }
  return entry.captured;
}

void StepGraphs::prepare(const StepShape& shape, const std::function<at::Tensor()>& step) {
  std::unique_ptr<Graph>& entry = graphs_[shape];
  if (entry) return;
  entry = std::make_unique<Graph>();
  step();
  capture(shape, *entry, step);
}

at::Tensor StepGraphs::run(const StepShape& shape, const std::function<at::Tensor()>& step) {
  std::unique_ptr<Graph>& entry = graphs_[shape];
  const bool first = !entry;
  if (first) entry = std::make_unique<Graph>();
  if (first || entry->refused || (!entry->captured && !capture(shape, *entry, step))) {
    ++eager_steps_;
    return step();
  }
  entry->graph.replay();
  ++replays_;
  return entry->logits;
}

#else

struct StepGraphs::Graph {};
struct StepGraphs::Pool {};
StepGraphs::StepGraphs() = default;
bool StepGraphs::ready(const StepShape&) const { return true; }
void StepGraphs::prepare(const StepShape&, const std::function<at::Tensor()>&) {}
at::Tensor StepGraphs::run(const StepShape&, const std::function<at::Tensor()>& step) {
  ++eager_steps_;
  return step();
}

#endif

StepGraphs::~StepGraphs() = default;

}  // namespace vivace
