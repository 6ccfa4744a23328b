// Rotary embedding of one token's heads, for the rotary operator and for the append to a cache.
#pragma once

#include <vector>

#include "csrc/cpu/kernels.h"

namespace vivace::cpu {

/// One head's vectors of a token.
struct TokenHeads {
  const void* x;
  int64_t x_stride;  // between heads
  void* out;         // may be x
  int64_t out_stride;
  int64_t heads, head_dim;
};

class Rotation {
 public:
  /// cos, sin: (positions, rotary_dim / 2) of table_dtype, which is fp32 or dtype.
  Rotation(DType dtype, const void* cos, const void* sin, DType table_dtype, int64_t rotary_dim, bool interleaved);

  /// Not to be called by several threads at once: a copy for each.
  void operator()(const TokenHeads& token, int64_t position);

 private:
  DType dtype_, table_dtype_;
  const char* cos_;
  const char* sin_;
  int64_t rotary_dim_;
  bool interleaved_;
  std::vector<float> row_;  // the table's row in fp32, where the table is not
};

}  // namespace vivace::cpu
