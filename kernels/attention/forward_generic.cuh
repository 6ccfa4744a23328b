// Attention forward on CUDA cores: any element type, head_dim up to 256, any strides and alignment, all layouts and
// features; everything in fp32. For fp32 models, and the yardstick of the faster families.
//
// A block takes kM = 32 queries of one head and walks over its keys in tiles of kN = 32, FlashAttention's loop (arXiv
// 2307.08691). Each of its 4 warps owns 8 queries; in S = Q K^T a lane is a key, in O += P V a lane is every 32nd dimension.
// Shared memory, fp32: Q (32 rows), K then V (32 rows, an odd stride: lanes read a column), P (32 x 32); 69 KiB at most.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/attention/tile_scheduler.cuh"
#include "kernels/common/convert.cuh"

namespace vivace::generic {

inline constexpr int kM = 32, kN = 32, kWarps = 4, kThreads = 32 * kWarps;
inline constexpr int kRows = kM / kWarps;  // of a warp
static_assert(kN == 32, "a lane a key");

/// What a launch passes.
struct ForwardArgs {
  AttentionParams params;
  Window window;
  TileOrder order;
  FastDivmod page_size;
};

/// Floats of a row of Q (a multiple of 4 for 16-byte reads) and of K or V (odd).
__host__ __device__ constexpr int q_stride(int64_t head_dim) { return static_cast<int>((head_dim + 3) / 4 * 4); }
__host__ __device__ constexpr int kv_stride(int64_t head_dim, int64_t head_dim_v) {
  return static_cast<int>((q_stride(head_dim) > head_dim_v ? q_stride(head_dim) : head_dim_v) | 1);
}
inline int64_t shared_bytes(const AttentionParams& p) {
  return int64_t{4} * (kM * q_stride(p.head_dim) + kM * kN + kN * kv_stride(p.head_dim, p.head_dim_v));
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

/// Copies rows [row0, row0 + rows) of `source` to shared memory as fp32; rows outside [begin, end) and columns [dim,
/// columns) become zeros.
template <typename T>
__device__ __forceinline__ void load_rows(float* to, int stride, const RowSource<T>& source, int row0, int rows, int begin,
                                          int end, int dim, int columns) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
    const bool exists = row0 + r >= begin && row0 + r < end;
    const T* from = exists ? source.row(row0 + r) : source.base;
    for (int d = lane; d < columns; d += 32) to[r * stride + d] = exists && d < dim ? to_float(from[d]) : 0.0f;
  }
}

/// A score of one row and key: all terms, and -inf where the row does not see the key.
template <typename T>
__device__ __forceinline__ float score(const ScoreTerms& terms, const VisibleKeys& visible, float qk, int i, int shift,
                                       int j) {
  if (!visible.contains(j)) return -INFINITY;
  const float s = terms(qk, i + shift, j);
  if (terms.bias == nullptr) return s;
  const int64_t row_offset = terms.bias_offset + i * terms.bias_row_stride;
  if (terms.bias_dtype == DType::kFloat32) return terms.biased<float>(s, row_offset, j);
  if (terms.bias_dtype == DType::kBool) return terms.biased<uint8_t>(s, row_offset, j);
  return terms.biased<T>(s, row_offset, j);
}

/// kGroups: of 32 dimensions of V.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads) attention_forward_kernel(const __grid_constant__ ForwardArgs args) {
  const AttentionParams& p = args.params;
  const Tile tile = args.order(blockIdx.x);
  const Sequence seq(p, tile.batch);
  const int row0 = tile.m_block * kM;
  if (row0 >= seq.q_rows) return;
  const KeyBlocks<kN> blocks(seq, args.window, row0, kM);

  const int64_t head = tile.head, head_kv = tile.head / (p.heads / p.heads_kv);
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int stride_q = q_stride(head_dim), stride_kv = kv_stride(head_dim, head_dim_v);
  const RowSource<T> q_rows{static_cast<const T*>(p.q) + seq.q_offset + head * p.q_stride[2], p.q_stride[1]};
  const RowSource<T> k_rows{static_cast<const T*>(p.k) + seq.k_offset + head_kv * p.k_stride[2], p.k_stride[1], seq.pages,
                            p.k_stride[0], args.page_size};
  const RowSource<T> v_rows{static_cast<const T*>(p.v) + seq.v_offset + head_kv * p.v_stride[2], p.v_stride[1], seq.pages,
                            p.v_stride[0], args.page_size};

  extern __shared__ __align__(16) float shared_floats[];
  float* q_tile = shared_floats;           // (kM, stride_q)
  float* p_tile = q_tile + kM * stride_q;  // (kM, kN)
  float* kv_tile = p_tile + kM * kN;       // (kN, stride_kv)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp * kRows;
  const float* q_warp = q_tile + warp_row * stride_q;
  float* p_warp = p_tile + warp_row * kN;

  const ScoreTerms terms(p, tile.batch, tile.head);
  const Dropout dropout(p, tile.batch, tile.head);
  const int shift = seq.keys - seq.queries;
  float row_max = -INFINITY, row_sum = 0.0f;  // of row `lane` of the warp's kRows
  float o[kRows][kGroups] = {};               // columns lane + 32 * g, unnormalised

  if (!blocks.empty()) load_rows(q_tile, stride_q, q_rows, row0, kM, 0, seq.queries, head_dim, stride_q);
  for (int n = blocks.begin; n < blocks.end; ++n) {
    load_rows(kv_tile, stride_kv, k_rows, n * kN, kN, seq.key_begin, seq.key_end, head_dim, stride_q);
    __syncthreads();

    float s[kRows] = {};  // of this lane's key
    const float* k_lane = kv_tile + lane * stride_kv;
#pragma unroll 2
    for (int d = 0; d < stride_q; d += 4) {
      const float k0 = k_lane[d], k1 = k_lane[d + 1], k2 = k_lane[d + 2], k3 = k_lane[d + 3];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(q_warp + r * stride_q + d);
        s[r] = fmaf(q.x, k0, fmaf(q.y, k1, fmaf(q.z, k2, fmaf(q.w, k3, s[r]))));
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) p_warp[r * kN + lane] = s[r];

    const int j = n * kN + lane;
    float rescale = 1.0f;  // of row `lane`
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const int i = row0 + warp_row + r;
      const float x = score<T>(terms, VisibleKeys(seq, args.window, i), p_warp[r * kN + lane], i, shift, j);
      const float old_max = __shfl_sync(0xffffffffu, row_max, r);
      const float new_max = fmaxf(old_max, warp_max(x));
      const float offset = new_max == -INFINITY ? 0.0f : new_max;  // nothing seen yet: not -inf - -inf
      float probability = expf(x - offset);
      const float block_sum = warp_sum(probability);
      if (lane == r) {
        rescale = expf(old_max - offset);
        row_sum = fmaf(row_sum, rescale, block_sum);
        row_max = new_max;
      }
      if (dropout.on && !dropout.keeps(dropout_draw(dropout.seed, dropout.offset, dropout.head_row, i, j), j))
        probability = 0.0f;
      p_warp[r * kN + lane] = probability;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float factor = __shfl_sync(0xffffffffu, rescale, r);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) o[r][g] *= factor;
    }

    __syncthreads();  // K has been used by every warp
    load_rows(kv_tile, stride_kv, v_rows, n * kN, kN, seq.key_begin, seq.key_end, head_dim_v, head_dim_v);
    __syncthreads();
#pragma unroll 2
    for (int c = 0; c < kN; ++c) {
      float v[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) v[g] = lane + 32 * g < head_dim_v ? kv_tile[c * stride_kv + lane + 32 * g] : 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float probability = p_warp[r * kN + c];
        if (probability == 0.0f) continue;  // a hidden key adds nothing, even if its value is NaN; the warp agrees
#pragma unroll
        for (int g = 0; g < kGroups; ++g) o[r][g] = fmaf(probability, v[g], o[r][g]);
      }
    }
    __syncthreads();  // V has been used by every warp
  }

  float factor = 0.0f, lse = -INFINITY;  // of row `lane`
  if (row_sum != 0.0f) {
    float rescale = 1.0f;
    if (p.sinks != nullptr) {  // one more logit, with no value behind it
      const float sink = p.sinks[tile.head], top = fmaxf(row_max, sink);
      rescale = expf(row_max - top);
      row_sum = row_sum * rescale + expf(sink - top);
      row_max = top;
    }
    factor = rescale / row_sum;
    if (dropout.on) factor /= 1.0f - p.dropout_p;
    lse = row_max + logf(row_sum);
  }
  if (lane < kRows && row0 + warp_row + lane < seq.q_rows && p.lse != nullptr) {
    p.lse[seq.lse_offset + head * seq.lse_head_stride + row0 + warp_row + lane] = lse;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float row_factor = __shfl_sync(0xffffffffu, factor, r);
    const int i = row0 + warp_row + r;
    if (i >= seq.q_rows) break;
    T* out = static_cast<T*>(p.out) + seq.out_offset + head * p.out_stride[2] + i * p.out_stride[1];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (lane + 32 * g < head_dim_v) out[lane + 32 * g] = from_float<T>(row_factor == 0.0f ? 0.0f : o[r][g] * row_factor);
    }
  }
}

}  // namespace vivace::generic
