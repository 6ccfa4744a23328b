// Tokens on their way from the device to the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>
#include <vector>

namespace vivace {

/// Starts a copy at once and waits only when it is read: on CUDA through pinned memory and an event.
class Readback {
 public:
  /// tokens (n) int64; may be overwritten by what is queued later.
  explicit Readback(const at::Tensor& tokens);
  /// Blocks until the copy has arrived.
  std::vector<int64_t> read();

 private:
  at::Tensor host_;
  std::optional<c10::Event> arrived_;
};

}  // namespace vivace
