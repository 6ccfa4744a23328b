// Attention, between the operators and the kernels: checks the arguments, fills AttentionParams, picks a kernel family.
// Order of calls: check_attention*() -> allocate out and lse -> plan_attention() -> allocate the workspace ->
// run_attention().
#pragma once

#include <optional>

#include "csrc/tensor_view.h"
#include "kernels/attention/params.h"

namespace vivace {

/// Arguments that the attention operators share, as in their schemas; a view that is not `defined` was not given.
struct AttentionArgs {
  TensorView q, k, v;                   // k and v: the keys, the cache or its pages
  std::optional<double> softmax_scale;  // none: head_dim^-0.5
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double softcap = 0.0;
  TensorView alibi_slopes, bias, sinks;
  double dropout_p = 0.0;
  TensorView rng_state;

  // variable length
  TensorView cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;

  // KV cache
  TensorView k_new, v_new, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad;
  bool rotary_interleaved = true;
  int64_t num_splits = 0;  // 0: chosen by plan_attention
  TensorView probe;
  int64_t probe_head = -1;
};

/// Each throws Error on a bad argument and returns the call without out, lse and workspace. On the CPU the values of index
/// tensors (cu_seqlens, cache_seqlens, block_table, ...) are checked too; on CUDA that would need a synchronisation.
AttentionParams check_attention(const AttentionArgs& args);
AttentionParams check_attention_varlen(const AttentionArgs& args);
AttentionParams check_attention_with_kvcache(const AttentionArgs& args);

/// Sets out (contiguous, q's shape with head_dim_v last) and lse.
void set_attention_outputs(AttentionParams& params, void* out, float* lse);

/// Picks the kernel family and num_splits; returns the bytes of workspace that run_attention needs (0 on the CPU).
int64_t plan_attention(AttentionParams& params, DeviceType device, int device_index);

/// Runs the call on `device`; on CUDA on `stream`, a cudaStream_t, without a synchronisation.
void run_attention(const AttentionParams& params, DeviceType device, int device_index, void* stream);

/// The implementation that attended in this thread's last call: "cpu", "attention_decode", "attention_forward_sm90", ...; ""
/// before the first.
const char* last_attention_kernel();

}  // namespace vivace
