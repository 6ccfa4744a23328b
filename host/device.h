// The device an engine runs on: choice, memory, streams.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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

/// CUDA: bytes in use on the whole device, by any process; 0 for a CPU.
int64_t used_memory(c10::Device device);

/// CUDA: torch's peak on that device; CPU: the process' peak resident size.
int64_t peak_memory(c10::Device device);

/// `values` on the device, without waiting for what is queued there.
at::Tensor upload(const std::vector<int32_t>& values, c10::Device device);
at::Tensor upload(const std::vector<int64_t>& values, c10::Device device);

/// Shrinks the stack that the context keeps for every thread the device can run (EngineOptions::small_stack).
void shrink_stack(c10::Device device);

/// Gives back to the device what torch's allocator keeps and nobody uses.
void release_memory(c10::Device device);

/// Blocks until what is queued on the current stream has run.
void synchronize(c10::Device device);

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
