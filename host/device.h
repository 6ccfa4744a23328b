// The device an engine runs on: choice, memory, streams.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <string>

namespace vivace {

/// "auto", "cpu", "cuda" or "cuda:<index>". auto is CUDA where the driver, torch and the operators (loaded) have it.
/// Throws Error with the reason when an explicit choice is not possible.
c10::Device resolve_device(const std::string& name);

/// Number of CUDA devices that torch sees; 0 without a driver.
int cuda_device_count();

/// "NVIDIA H200"; the processor's name for a CPU.
std::string device_name(c10::Device device);

/// Bytes that can still be allocated.
int64_t free_memory(c10::Device device);

/// CUDA: torch's peak on that device; CPU: the process' peak resident size.
int64_t peak_memory(c10::Device device);

/// While alive, this thread's work on a CUDA device goes to a stream of its own (graphs cannot be captured on the default
/// stream). Nothing on a CPU.
class StreamScope {
 public:
  explicit StreamScope(c10::Device device);
  ~StreamScope();
  /// Blocks until what was queued on the stream has run.
  void synchronize() const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

}  // namespace vivace
