#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// Rotary position embedding (RoFormer, arXiv 2104.09864) of (tokens, heads, head_dim); dimensions past rotary_dim are
/// copied.
struct RotaryParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // (tokens, heads, head_dim), last dimension contiguous
  void* out = nullptr;           // the same shape; may be x
  int64_t x_stride[2] = {0, 0};  // token, head
  int64_t out_stride[2] = {0, 0};
  const void* cos = nullptr;  // (max_position, rotary_dim / 2), contiguous, of table_dtype
  const void* sin = nullptr;
  DType table_dtype = DType::kFloat32;  // fp32 or dtype
  const void* positions = nullptr;      // (tokens) int32 or int64; null: token index modulo seqlen
  DType position_dtype = DType::kInt32;
  int64_t seqlen = 0;  // for null positions
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;
  int64_t max_position = 0;
  bool interleaved = false;
};

}  // namespace vivace
