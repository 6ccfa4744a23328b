// Launchers of the CUDA attention kernels. Each launches on `stream`, allocates nothing and never synchronises, so it
// can be captured in a CUDA graph, and returns cudaErrorNotSupported where its family does not cover the call.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention/params.h"

namespace vivace {

/// Forward for Hopper (sm_90a: wgmma, TMA): fp16 and bf16, head_dim a multiple of 8 and head_dim_v the same, all layouts
/// but pages, causal or windowed, without score modifiers and dropout.
cudaError_t attention_forward_sm90(const AttentionParams& params, cudaStream_t stream);

/// Tensor-core forward for sm_80 and newer (mma.sync, cp.async): fp16 and bf16, all layouts, all features.
cudaError_t attention_forward_sm80(const AttentionParams& params, cudaStream_t stream);

/// Reference-speed forward on CUDA cores: any dtype (fp32 too), any head_dim up to 256, all layouts, all features.
cudaError_t attention_forward_generic(const AttentionParams& params, cudaStream_t stream);

/// Few queries a sequence against a long cache, fp16 and bf16: one launch. Takes the direct kernel (decode_direct.cuh) where
/// it covers the call; else those of decode_kernel.cuh, which cover more: sm90 where params.arch is 90 and it covers the
/// call, else sm80. params.probe is written too. Needs params.multiprocessors and a workspace of attention_workspace()
/// bytes, with whatever in it, that no other launch uses at the same time.
cudaError_t attention_decode(const AttentionParams& params, cudaStream_t stream);
cudaError_t attention_decode_direct(const AttentionParams& params, cudaStream_t stream);
cudaError_t attention_decode_sm80(const AttentionParams& params, cudaStream_t stream);
cudaError_t attention_decode_sm90(const AttentionParams& params, cudaStream_t stream);

/// Whether attention_decode appends params.k_new and v_new to the cache itself: no attention_append before it then.
bool attention_decode_appends(const AttentionParams& params);

/// Bytes of params.workspace that attention_decode needs; by batch, heads, head_dim, capacity and splits.
int64_t attention_decode_workspace(const AttentionParams& params);

/// The same for fp32 on CUDA cores: keys split over params.num_splits CTAs, then combined by attention_combine. Partial
/// results lie in params.workspace (layout in kernels/attention/workspace.h).
cudaError_t attention_decode_fp32(const AttentionParams& params, cudaStream_t stream);

/// Merges the num_splits partial results of attention_decode_fp32 into params.out and params.lse.
cudaError_t attention_combine(const AttentionParams& params, cudaStream_t stream);

/// Rotates k_new and copies it and v_new into the cache; rotates q into the workspace when rotary is on.
cudaError_t attention_append(const AttentionParams& params, cudaStream_t stream);

/// Writes params.probe from q, the keys and params.lse; not needed after attention_decode.
cudaError_t attention_probe(const AttentionParams& params, cudaStream_t stream);

}  // namespace vivace
