// A tensor without a framework: what the checks need to know of an argument.
#pragma once

#include <array>
#include <cstdint>
#include <iosfwd>
#include <string>

#include "kernels/common/dtype.h"

namespace vivace {

enum class DeviceType : int32_t { kCpu, kCuda };

struct TensorView {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  DeviceType device = DeviceType::kCpu;
  int device_index = 0;
  int dims = 0;
  std::array<int64_t, kMaxDims> sizes{};
  std::array<int64_t, kMaxDims> strides{};  // in elements

  bool defined = false;  // false: an optional argument that was not given
  explicit operator bool() const { return defined; }
  int64_t size(int d) const { return sizes[d < 0 ? d + dims : d]; }
  int64_t stride(int d) const { return strides[d < 0 ? d + dims : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= sizes[d];
    return n;
  }
};

/// "[2, 128, 4, 64]"
std::string shape_string(const TensorView& t);
/// Writes the shape: an error's parts are then formatted only when it is raised.
std::ostream& operator<<(std::ostream& out, const TensorView& t);
/// "bfloat16"
const char* dtype_name(DType dtype);

}  // namespace vivace
