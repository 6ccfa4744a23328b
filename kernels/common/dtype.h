// Element types that the operators take. Plain C++: no CUDA, no torch.
#pragma once

#include <cstdint>

namespace vivace {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kUInt8, kBool, kFloat64 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kUInt8:
    case DType::kBool: return 1;
  }
  return 0;
}

}  // namespace vivace
