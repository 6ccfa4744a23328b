// The matrix products of the token step's chain: what all families of them take.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// The matrices of the step; kOut and kDown add to the residual stream.
enum class Matrix { kQkv, kOut, kGateUp, kDown, kHead };

/// y = W x for all rows of a step, and what follows from it, in the epilogue. Pointers are device memory.
///
/// Norms take no kernel of their own. Who writes the residual stream also writes x_next = residual * gain, rounded, and for
/// each row partial sums of its squares; who reads x_next multiplies y by rsqrt(sum / hidden + eps).
struct LinearArgs {
  int32_t rows = 0;
  int32_t multiprocessors = 0;
  int32_t k = 0;                 // columns of W
  int32_t features = 0;          // rows of W
  const void* weight = nullptr;  // (features, k): this layer's
  int32_t weight_row = 0;        // its first row within the stack that the tensor map describes
  const void* x = nullptr;       // (rows, k)

  // kQkv, kGateUp, kHead: the norm of x
  const float* squares = nullptr;  // (rows, square_parts) partial sums
  int32_t square_parts = 0;
  float inverse_hidden = 0.0f;
  float eps = 0.0f;

  // kOut, kDown
  float* residual = nullptr;      // (rows, features), read and written
  void* x_next = nullptr;         // (rows, features)
  const void* gain = nullptr;     // (features) of the norm that comes next
  float* squares_next = nullptr;  // (rows, features / tile)

  void* out = nullptr;      // kGateUp: (rows, features / 2); kQkv: rotated q, (rows, heads * 64)
  float* logits = nullptr;  // kHead: (rows, features)

  // kQkv: rotary and the cache, one layer of it
  void* k_cache = nullptr;
  void* v_cache = nullptr;
  int64_t k_stride[3] = {0, 0, 0};  // cache row, position, head
  int64_t v_stride[3] = {0, 0, 0};
  int64_t capacity = 0;
  const int32_t* cache_seqlens = nullptr;    // (rows)
  const int32_t* cache_batch_idx = nullptr;  // (rows)
  int32_t heads = 0;
  int32_t heads_kv = 0;
  const void* rotary_cos = nullptr;  // (rotary_positions, 32)
  const void* rotary_sin = nullptr;
  bool rotary_fp32 = true;  // else of the product's type
  int64_t rotary_positions = 0;
};

}  // namespace vivace
