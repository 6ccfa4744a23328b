// Captured decode steps.
#pragma once

#include <ATen/core/Tensor.h>

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>

namespace vivace {

/// What makes two decode steps the same graph: all else is read on the device.
struct StepShape {
  int64_t requests, rows;
  bool sampled;  // the step ends with vivace::sample_advance; otherwise with the logits
  bool probes;   // it writes the alignment heads' attention
  bool fused;    // it goes through vivace::decode_step
  auto operator<=>(const StepShape&) const = default;
};

/// One CUDA graph for each shape, sharing a memory pool: they run one after another on one stream. A shape runs eagerly the
/// first time (cuBLAS handles, workspaces and lazily loaded kernels come into being), is captured the second time and
/// replayed from then on. One that cannot be captured stays eager.
class StepGraphs {
 public:
  StepGraphs();
  ~StepGraphs();

  /// Runs `step`, which returns the logits (rows, vocab) and otherwise works on buffers of fixed address, or replays it.
  /// The logits of a replay are overwritten by the next one; of a sampled shape they are not kept, and not returned.
  at::Tensor run(const StepShape& shape, const std::function<at::Tensor()>& step);
  /// Runs `step` once and captures it, so that run() replays from its first call on. Counts the capture alone.
  void prepare(const StepShape& shape, const std::function<at::Tensor()>& step);
  /// False when run() will warm up or capture, which takes long: what is in flight is better read first.
  bool ready(const StepShape& shape) const;

  /// What ran so far was a warm-up; captures stay counted.
  void forget_runs() { replays_ = eager_steps_ = 0; }
  int64_t replays() const { return replays_; }
  int64_t captures() const { return captures_; }
  int64_t eager_steps() const { return eager_steps_; }

 private:
  struct Graph;
  struct Pool;
  bool capture(const StepShape& shape, Graph& graph, const std::function<at::Tensor()>& step);

  std::unique_ptr<Pool> pool_;
  std::map<StepShape, std::unique_ptr<Graph>> graphs_;
  int64_t replays_ = 0, captures_ = 0, eager_steps_ = 0;
};

/// The number of requests that a step for n is padded to: a power of two up to 8, then a multiple of 4, at most `limit`.
int64_t padded_requests(int64_t n, int64_t limit);

}  // namespace vivace
