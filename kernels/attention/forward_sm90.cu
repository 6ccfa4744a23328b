// Chooses the sm90 kernel of a call; the kernel is in forward_sm90.cuh.
#include <cuda_runtime_api.h>

#include "kernels/attention/launch.h"
#include "kernels/attention/mask.cuh"

namespace vivace {
namespace sm90 {

// Defined in forward_sm90_launch.cuh, instantiated in the files of each head dimension.
template <int kHeadDim, bool kMasked>
cudaError_t launch_dense(const AttentionParams& p, cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_ragged(const AttentionParams& p, cudaStream_t stream);

namespace {

/// Attention without score modifiers and pages, on lengths that fit the kernel's 32-bit arithmetic.
bool covers(const AttentionParams& p) {
  const bool plain = p.softcap == 0.0f && p.alibi_slopes == nullptr && p.bias == nullptr && p.sinks == nullptr &&
                     p.dropout_p == 0.0f && p.block_table == nullptr && p.cache_leftpad == nullptr && p.softmax_scale > 0.0f;
  const bool shape = p.head_dim <= 256 && p.head_dim % 8 == 0 && p.head_dim_v == p.head_dim &&
                     (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16);
  const int64_t keys = !p.has_cache && p.cu_seqlens_k != nullptr ? p.total_k : p.seqlen_k;
  constexpr int64_t kMax = int64_t{1} << 30;
  return plain && shape && p.seqlen_q > 0 && keys > 0 && p.batch > 0 && p.heads > 0 && p.seqlen_q < kMax && keys < kMax &&
         p.total_q < kMax && p.batch * p.heads * (p.seqlen_q / 128 + 1) < kMax;
}

bool is_ragged(const AttentionParams& p) {
  return p.has_cache || p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr || p.seqused_q != nullptr ||
         p.seqused_k != nullptr;
}

bool is_masked(const AttentionParams& p) {
  const Window window(p);
  return window.left != Window::kOpen || window.right != Window::kOpen;
}

template <int kHeadDim>
cudaError_t launch_forward(const AttentionParams& p, cudaStream_t stream) {
  if (is_ragged(p)) return launch_ragged<kHeadDim>(p, stream);
  return is_masked(p) ? launch_dense<kHeadDim, true>(p, stream) : launch_dense<kHeadDim, false>(p, stream);
}

}  // namespace
}  // namespace sm90

cudaError_t attention_forward_sm90(const AttentionParams& params, cudaStream_t stream) {
  if (!sm90::covers(params)) return cudaErrorNotSupported;
  if (params.head_dim <= 64) return sm90::launch_forward<64>(params, stream);
  if (params.head_dim <= 96) return sm90::launch_forward<96>(params, stream);
  if (params.head_dim <= 128) return sm90::launch_forward<128>(params, stream);
  if (params.head_dim <= 192) return sm90::launch_forward<192>(params, stream);
  return sm90::launch_forward<256>(params, stream);
}

}  // namespace vivace
