// Tokens on their way from the device to the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>
#include <vector>

namespace vivace {

/// Tokens of a step that has been queued; waits for it only when they are read.
class Readback {
 public:
  /// Queues a copy of tokens (n) int64, which may be overwritten by what is queued later.
  explicit Readback(const at::Tensor& tokens);
  /// The step writes its tokens to history (slots, at least slots.size()) int64 of the host by itself, that of request r to
  /// history[slots[r]][r], and is the last thing queued on `device`. The entries are read before they are written again.
  Readback(const at::Tensor& history, std::vector<int64_t> slots, at::Device device);
  /// Blocks until the tokens have arrived.
  std::vector<int64_t> read();

 private:
  void record(at::Device device);

  at::Tensor host_;
  std::vector<int64_t> slots_;  // of history; empty: host_ is the tokens
  std::optional<c10::Event> arrived_;
};

}  // namespace vivace
