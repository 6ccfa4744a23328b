#pragma once

#include "csrc/tensor_view.h"
#include "kernels/rotary/rotary.h"

namespace vivace {

/// x (tokens, heads, head_dim) or (batch, seqlen, heads, head_dim); cos and sin (max_position, rotary_dim / 2), fp32 or x's
/// dtype; positions, if defined, int32 or int64, (tokens) or (batch, seqlen). `out` is x's shape; it may be x (`in_place`).
/// One RotaryParams covers `batches` calls where the batches of x are not evenly spaced; run_rotary does them all.
struct RotaryCall {
  RotaryParams params;
  int64_t batches = 1;
  int64_t x_batch_stride = 0;
  int64_t out_batch_stride = 0;
};
RotaryCall check_rotary(const TensorView& x, const TensorView& cos, const TensorView& sin, const TensorView& positions,
                        bool interleaved, bool in_place);
/// Contiguous, x's shape.
void set_rotary_output(RotaryCall& call, void* out);
void run_rotary(const RotaryCall& call, DeviceType device, int device_index, void* stream);

}  // namespace vivace
