#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// out = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, rounded once.
/// With `residual`: residual += x first (rounded to dtype and written back), and the norm is of the sum.
struct RmsNormParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // (rows, width); stride between rows below, last dimension contiguous
  void* residual = nullptr;      // (rows, width) or null
  const void* weight = nullptr;  // (width) of dtype
  void* out = nullptr;           // (rows, width), contiguous
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
  int64_t residual_stride = 0;
  float eps = 1e-5f;
};

}  // namespace vivace
