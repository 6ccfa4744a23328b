#pragma once

#include <cstdint>

#include "kernels/attention/params.h"

namespace vivace {

/// Gradients of one attention call. `forward` is that call: its inputs, masks and dropout, and its results `out` and
/// `lse`, which are read here. Dense and variable length only, without a cache, rotary or probe. Every row of dq, dk and
/// dv is written, rows that no query sees (and rows past seqused) with 0. Bias and sinks have no gradient here.
struct AttentionBackwardParams {
  AttentionParams forward;

  const void* dout = nullptr;  // out's shape and dtype, last dimension contiguous
  void* dq = nullptr;          // q's shape and dtype
  void* dk = nullptr;          // k's shape and dtype: heads_kv heads, summed over the query heads that share each
  void* dv = nullptr;          // v's shape and dtype

  int64_t dout_stride[3] = {0, 0, 0};  // batch, row, head
  int64_t dq_stride[3] = {0, 0, 0};
  int64_t dk_stride[3] = {0, 0, 0};
  int64_t dv_stride[3] = {0, 0, 0};
};

}  // namespace vivace
