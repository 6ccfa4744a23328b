#pragma once

#include "csrc/attention.h"
#include "kernels/attention/backward_params.h"

namespace vivace {

/// `op` is "attention_backward" or "attention_varlen_backward", `forward` the checked forward call; dout, out and lse are
/// its results and their gradient. The caller sets dq, dk and dv with set_attention_gradients.
AttentionBackwardParams check_attention_backward(const char* op, const AttentionParams& forward, const TensorView& q,
                                                 const TensorView& dout, const TensorView& out,
                                                 const TensorView& softmax_lse);

/// Contiguous, q's, k's and v's shapes.
void set_attention_gradients(AttentionBackwardParams& params, void* dq, void* dk, void* dv);

/// CPU. On CUDA it throws: there are no backward kernels yet.
void run_attention_backward(const char* op, const AttentionBackwardParams& params, DeviceType device, int device_index);

}  // namespace vivace
