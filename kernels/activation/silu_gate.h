#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// out = silu(gate) * up, where a row of x is [gate (width) | up (width)]; in fp32, rounded once.
struct SiluGateParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // (rows, 2 * width), last dimension contiguous
  void* out = nullptr;      // (rows, width), contiguous
  int64_t rows = 0;
  int64_t width = 0;
  int64_t x_stride = 0;
};

}  // namespace vivace
