// Merges the partial results of attention_decode: out = sum_s exp(lse_s - lse) out_s, lse = log sum_s exp(lse_s), the splits
// in their order. The attention sink, one more logit without a value, enters here and only here when the keys were split.
// One warp a (query, head): its lanes first hold the splits' lse, then one to eight dimensions each.
#include "kernels/attention/launch.h"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/workspace.h"
#include "kernels/common/vector.cuh"

namespace vivace {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxDims = 8;  // of a lane: head_dim_v up to 256

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    combine_kernel(const __grid_constant__ AttentionParams p, const float* out_partial, const float* lse_partial) {
  const int lane = threadIdx.x % 32;
  const int64_t units = p.batch * p.seqlen_q * p.heads;
  const int64_t split_rows = p.heads * p.total_q;  // rows of one split
  for (int64_t unit = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; unit < units; unit += int64_t{gridDim.x} * kWarps) {
    const int64_t slot = unit / p.heads;
    const int64_t h = unit - slot * p.heads;
    const int b = static_cast<int>(slot / p.seqlen_q);
    const int i = static_cast<int>(slot - b * p.seqlen_q);
    const Sequence seq(p, b);
    if (i >= seq.q_rows) continue;
    const int64_t q_row = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[b] + i : slot;
    const int64_t row = h * p.total_q + q_row;
    const float sink = p.sinks != nullptr ? p.sinks[h] : -INFINITY;

    float largest = -INFINITY;
    for (int64_t split = lane; split < p.num_splits; split += 32) {
      largest = fmaxf(largest, lse_partial[split * split_rows + row]);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    const bool empty = largest == -INFINITY;  // no split has seen a key
    largest = fmaxf(largest, sink);

    float sum = sink == -INFINITY ? 0.0f : expf(sink - largest);
    float acc[kMaxDims] = {};  // dimensions lane + 32 * n
#pragma unroll 4
    for (int64_t split = 0; split < p.num_splits; ++split) {
      const float lse = lse_partial[split * split_rows + row];
      if (lse == -INFINITY) continue;  // its part of out_partial was not written
      const float weight = expf(lse - largest);
      sum += weight;
      const float* part = out_partial + (split * split_rows + row) * p.head_dim_v;
#pragma unroll
      for (int n = 0; n < kMaxDims; ++n) {
        if (lane + 32 * n < p.head_dim_v) acc[n] += weight * part[lane + 32 * n];
      }
    }
    const float scale = empty ? 0.0f : 1.0f / sum;
    T* out = static_cast<T*>(p.out) + seq.out_offset + i * p.out_stride[1] + h * p.out_stride[2];
#pragma unroll
    for (int n = 0; n < kMaxDims; ++n) {
      if (lane + 32 * n < p.head_dim_v) out[lane + 32 * n] = from_float<T>(acc[n] * scale);
    }
    if (lane == 0 && p.lse != nullptr)
      p.lse[seq.lse_offset + h * seq.lse_head_stride + i] = empty ? -INFINITY : largest + logf(sum);
  }
}

}  // namespace

cudaError_t attention_combine(const AttentionParams& p, cudaStream_t stream) {
  const int64_t units = p.batch * p.seqlen_q * p.heads;
  if (p.num_splits <= 1 || units == 0 || p.head_dim_v == 0) return cudaSuccess;
  if (p.head_dim_v > 32 * kMaxDims) return cudaErrorNotSupported;
  const AttentionWorkspace at = attention_workspace(p);
  const char* workspace = static_cast<const char*>(p.workspace);
  return for_float_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    combine_kernel<T><<<grid_x(ceil_div(units, kWarps)), kWarps * 32, 0, stream>>>(
        p, reinterpret_cast<const float*>(workspace + at.out_partial),
        reinterpret_cast<const float*>(workspace + at.lse_partial));
    return cudaGetLastError();
  });
}

}  // namespace vivace
