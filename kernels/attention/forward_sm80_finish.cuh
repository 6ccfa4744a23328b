// The end of the sm80 forward kernels whose warps have rows of their own: normalises a warp's rows and writes them.
#pragma once

#include "kernels/attention/forward_sm80_tile.cuh"

namespace vivace::sm80 {

/// o, softmax: of the warp's rows, the first of them warp_row; staging: shared memory for its rows of output, no other
/// warp's.
template <typename T, int kDim, bool kRich, int kFragsM>
__device__ __forceinline__ void finish_rows(const ForwardArgs& args, const BlockRows<T>& rows, int warp_row,
                                            const WarpSoftmax<kFragsM>& softmax, float (&o)[kFragsM][kDim / 8][4],
                                            uint32_t staging, bool has_dropout) {
  const AttentionParams& p = args.params;
  const Sequence& seq = rows.seq;
  const int lane = threadIdx.x % 32, first = rows.row0 + warp_row;
  const float sink = kRich && p.sinks != nullptr ? p.sinks[rows.tile.head] : -INFINITY;
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first + 16 * m + 8 * r + lane / 4;
      float factor;
      float lse = softmax.finish(m, r, sink, factor);
      if (i >= seq.queries) {  // steps without a mask compute these rows too
        lse = -INFINITY;
        factor = 0.0f;
      }
      if (lane % 4 == 0 && i < seq.q_rows && p.lse != nullptr) {
        p.lse[seq.lse_offset + rows.tile.head * seq.lse_head_stride + i] = lse;
      }
      if (kRich && has_dropout) factor /= 1.0f - p.dropout_p;
#pragma unroll
      for (int f = 0; f < kDim / 8; ++f) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) o[m][f][e] = factor == 0.0f ? 0.0f : o[m][f][e] * factor;
      }
    }
  }
  T* out = static_cast<T*>(p.out) + seq.out_offset + rows.tile.head * p.out_stride[2] + first * p.out_stride[1];
  store_output<T, kDim>(o, staging, out, p.out_stride[1], min(16 * kFragsM, seq.q_rows - first),
                        static_cast<int>(p.head_dim_v), !kRich || args.aligned);
}

}  // namespace vivace::sm80
