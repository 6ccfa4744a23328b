// How a tile of 16-bit rows lies in shared memory.
#pragma once

#include <cstdint>

#include "kernels/common/ptx.cuh"

namespace vivace {

/// Rows of kDim 16-bit elements, back to back, their 16-byte chunks permuted within 128 (or, where a row is not a multiple
/// of 128 bytes, 64) bytes: the same chunk of 8 neighbouring rows falls into 8 different bank groups, so that ldmatrix (8
/// rows of 16 bytes) and cp.async (a row's neighbouring chunks) are both free of conflicts.
template <int kDim>
struct Swizzle {
  static_assert(kDim % 32 == 0);
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kRowLanes = kDim % 64 == 0 ? 8 : 4;  // chunks that are permuted together; threads that copy a row
  static constexpr int kChunkMask = kRowLanes - 1;

  static __device__ __forceinline__ int phase(int row) { return kRowLanes == 8 ? row & 7 : (row >> 1) & 3; }

  /// Bytes from the tile's start, which is aligned to 128, to a chunk.
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ phase(row)) << 4);
  }

  /// The address of chunk c + chunks from that of chunk c in the same row; c and chunks have no bit in common.
  static __device__ __forceinline__ uint32_t advance(uint32_t address, int chunks) {
    return (address ^ ((chunks & kChunkMask) << 4)) + ((chunks & ~kChunkMask) << 4);
  }
};

/// Starts the copy of rows [row0, row0 + kRows) of `source` into the tile at `shared`, by all kThreads threads. Rows outside
/// [row_begin, row_end) and columns at or past `dim` become zeros without a read. Complete after a commit and a wait.
template <int kRows, int kDim, int kThreads, typename Rows>
__device__ __forceinline__ void load_tile_async(uint32_t shared, const Rows& source, int row0, int row_begin, int row_end,
                                                int dim) {
  using Layout = Swizzle<kDim>;
  constexpr int kRowsAtOnce = kThreads / Layout::kRowLanes;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0, "a thread's rows share one phase");
  const int row = threadIdx.x / Layout::kRowLanes;
  const int chunk = threadIdx.x % Layout::kRowLanes;
  const uint32_t to = shared + Layout::offset(row, chunk);
  const auto copy_row = [&](int i, const auto* from) {
    const bool exists = row0 + row + i >= row_begin && row0 + row + i < row_end;
#pragma unroll
    for (int c = 0; c < kDim / 8; c += Layout::kRowLanes) {
      const int bytes = exists && 8 * (chunk + c) < dim ? 16 : 0;
      ptx::cp_async_16(to + i * Layout::kRowBytes + 16 * c, from + 8 * (chunk + c), bytes);
    }
  };
  if (source.pages == nullptr) {
    const auto* from = source.base + (row0 + row) * source.row_stride;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      copy_row(i, from);
      from += kRowsAtOnce * source.row_stride;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      const int r = row0 + row + i;  // outside the range there may be no page
      copy_row(i, r >= row_begin && r < row_end ? source.row(r) : source.base);
    }
  }
}

/// The same for any alignment and any dim, one element at a time.
template <int kRows, int kDim, int kThreads, typename Rows>
__device__ __noinline__ void load_tile_elements(uint32_t shared, const Rows& source, int row0, int row_begin, int row_end,
                                                int dim) {
  using Layout = Swizzle<kDim>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * (kDim / 8); i += kThreads) {
    const int row = i / (kDim / 8), chunk = i % (kDim / 8);
    const int r = row0 + row;
    uint32_t words[4] = {0, 0, 0, 0};
    if (r >= row_begin && r < row_end) {
      const auto* from = reinterpret_cast<const uint16_t*>(source.row(r)) + 8 * chunk;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (8 * chunk + e < dim) words[e / 2] |= static_cast<uint32_t>(from[e]) << (16 * (e % 2));
      }
    }
    ptx::st_shared(shared + Layout::offset(row, chunk), make_uint4(words[0], words[1], words[2], words[3]));
  }
}

}  // namespace vivace
