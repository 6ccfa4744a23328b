// From output fragments in registers to rows of `out` in memory.
#pragma once

#include <cstdint>

#include "kernels/attention/swizzle.cuh"
#include "kernels/common/convert.cuh"

namespace vivace {

/// One warp writes `rows` rows of `dim` columns from swizzled shared memory, neighbouring lanes 16 neighbouring bytes.
/// aligned: every row of `out` starts at a multiple of 16 bytes and is as long.
template <typename T, int kDim>
__device__ __forceinline__ void store_staged(uint32_t staging, T* out, int64_t row_stride, int rows, int dim, bool aligned) {
  using Layout = Swizzle<kDim>;
  const int lane = threadIdx.x % 32;
  constexpr int kRowLanes = Layout::kRowLanes;
  for (int row = lane / kRowLanes; row < rows; row += 32 / kRowLanes) {
#pragma unroll
    for (int chunk = lane % kRowLanes; chunk < kDim / 8; chunk += kRowLanes) {
      const uint4 x = ptx::ld_shared_v4(staging + Layout::offset(row, chunk));
      T* to = out + row * row_stride + 8 * chunk;
      if (aligned) {
        if (8 * chunk < dim) *reinterpret_cast<uint4*>(to) = x;
      } else {
        const T* elements = reinterpret_cast<const T*>(&x);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (8 * chunk + i < dim) to[i] = elements[i];
        }
      }
    }
  }
}

/// Writes one warp's output, (16 * kFragsM, kDim): its first `rows` rows and `dim` columns. Fragments go through `staging`,
/// swizzled shared memory of as many rows, this warp's own, so that neighbouring lanes store neighbouring 16 bytes.
/// o: m16 fragments of rows lane / 4 and lane / 4 + 8, already normalised; out: the warp's row 0. aligned: see store_staged.
template <typename T, int kDim, int kFragsM>
__device__ __forceinline__ void store_output(const float (&o)[kFragsM][kDim / 8][4], uint32_t staging, T* out,
                                             int64_t row_stride, int rows, int dim, bool aligned) {
  using Layout = Swizzle<kDim>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + lane / 4;
#pragma unroll
      for (int f = 0; f < kDim / 8; ++f) {
        ptx::st_shared(staging + Layout::offset(row, f) + 4 * (lane % 4),
                       pack2<T>(o[m][f][2 * half], o[m][f][2 * half + 1]));
      }
    }
  }
  __syncwarp();
  store_staged<T, kDim>(staging, out, row_stride, rows, dim, aligned);
}

}  // namespace vivace
