// torch::stable::Tensor <-> TensorView, output allocation and the current CUDA stream, over torch's C shims alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "csrc/tensor_view.h"

namespace vivace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// What is read. `name` is for the error on a dtype, device or number of dimensions that no operator takes.
TensorView view(const Tensor& t, const char* name);
TensorView view(const OptionalTensor& t, const char* name);
/// What is written in place (a copy-on-write tensor gets its own memory first).
TensorView mutable_view(const Tensor& t, const char* name);
TensorView mutable_view(const OptionalTensor& t, const char* name);

/// Uninitialised, contiguous, on like's device.
Tensor empty(std::initializer_list<int64_t> sizes, DType dtype, const TensorView& like);
/// Of like's shape and dtype, contiguous.
Tensor empty_like(const TensorView& like);
void* data_of(const Tensor& t);

/// Makes like's device current while it lives, where that is a GPU, and knows the current stream there.
class DeviceScope {
 public:
  explicit DeviceScope(const TensorView& like);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  void* stream() const { return stream_; }  // cudaStream_t; null on the CPU

 private:
  void* stream_ = nullptr;
  DeviceGuardHandle guard_ = nullptr;
};

/// Registers `fn` (through TORCH_BOX) as `name` for CPU and CUDA tensors. Also in a CPU-only build: the error of csrc is
/// clearer than the dispatcher's.
#define VIVACE_REGISTER_IMPLS(register_fn)                      \
  STABLE_TORCH_LIBRARY_IMPL(vivace, CPU, m) { register_fn(m); } \
  STABLE_TORCH_LIBRARY_IMPL(vivace, CUDA, m) { register_fn(m); }

}  // namespace vivace
