// How tiles of keys and values reach shared memory: every warp has a ring of its own, filled by nobody else, so that no
// barrier of the block stands between a copy and its use.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/attention/decode_tile.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/tma.cuh"

namespace vivace {

/// By cp.async, 16 bytes a lane: any strides, pages of any size.
template <typename T, int kKeys, int kDim, int kWarpsOf, int kStagesOf>
struct DecodeCopy {
  using Layout = DecodeLayout<kKeys, kDim>;
  static constexpr int kWarps = kWarpsOf, kStages = kStagesOf;
  struct Maps {};

  const AttentionParams& p;
  const FastDivmod& page_size;
  uint32_t ring;
  const T *k = nullptr, *v = nullptr;
  const int32_t* pages = nullptr;
  int key_end = 0;

  __device__ __forceinline__ DecodeCopy(const DecodeArgs& args, const Maps&, uint32_t ring_address, uint64_t*)
      : p(args.params), page_size(args.page_size), ring(ring_address) {}

  __device__ __forceinline__ void begin(const DecodeEntry& entry, int batch, int head_kv) {
    const bool packed = !p.has_cache && p.cu_seqlens_k != nullptr;
    k = static_cast<const T*>(p.k) + head_kv * p.k_stride[2];
    v = static_cast<const T*>(p.v) + head_kv * p.v_stride[2];
    if (p.block_table != nullptr) {
      pages = p.block_table + batch * p.block_table_stride;
    } else {
      k += entry.row * p.k_stride[packed ? 1 : 0];
      v += entry.row * p.v_stride[packed ? 1 : 0];
    }
    key_end = p.has_cache ? min(entry.keys, static_cast<int>(p.seqlen_k)) : entry.keys;
  }

  __device__ __forceinline__ uint32_t stage_address(int stage) const { return ring + stage * Layout::kStageBytes; }

  __device__ __forceinline__ void issue(int stage, const DecodeRun&, int tile) {
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    const uint32_t to = stage_address(stage);
    int page = 0, slot = 0;
    if (pages != nullptr) {
      const int key = tile * kKeys + lane % kKeys;
      if (key < key_end) {
        page_size(key, page, slot);
        page = pages[page];
      }
    }
#pragma unroll
    for (int row = 0; row < kKeys; row += 4) {
      const int r = row + lane / 8, key = tile * kKeys + r;
      const bool exists = key < key_end;  // past it there may be no memory, and no page: zeros
      int64_t k_at, v_at;
      if (pages != nullptr) {
        const int64_t from_page = __shfl_sync(~0u, page, r), from_slot = __shfl_sync(~0u, slot, r);
        k_at = from_page * p.k_stride[0] + from_slot * p.k_stride[1];
        v_at = from_page * p.v_stride[0] + from_slot * p.v_stride[1];
      } else {
        k_at = key * p.k_stride[1];
        v_at = key * p.v_stride[1];
      }
#pragma unroll
      for (int c = 0; c < kDim / 8; c += 8) {
        const bool in_k = exists && 8 * (c + chunk) < p.head_dim, in_v = exists && 8 * (c + chunk) < p.head_dim_v;
        ptx::cp_async_16(to + Layout::offset(r, c + chunk), in_k ? k + k_at + 8 * (c + chunk) : k, in_k ? 16 : 0);
        ptx::cp_async_16(to + Layout::kTileBytes + Layout::offset(r, c + chunk), in_v ? v + v_at + 8 * (c + chunk) : v,
                         in_v ? 16 : 0);
      }
    }
  }

  __device__ __forceinline__ void commit() { ptx::cp_async_commit(); }

  /// Until the oldest of `under_way` tiles is there; it is at `stage`.
  __device__ __forceinline__ void wait(int, int under_way) {
    if (under_way == kStages) {
      ptx::cp_async_wait<kStages - 1>();
    } else {
      ptx::cp_async_wait<0>();  // at the end: all of them
    }
    __syncwarp();  // a lane reads what others have copied
  }
};

/// By the tensor copy engine of Hopper: one lane starts a tile's copies. Cache rows, or pages of a multiple of kKeys.
template <typename T, int kKeys, int kDim, int kWarpsOf, int kStagesOf>
struct DecodeTensorCopy {
  using Layout = DecodeLayout<kKeys, kDim>;
  static constexpr int kWarps = kWarpsOf, kStages = kStagesOf;
  struct Maps {
    CUtensorMap k, v;
  };

  const AttentionParams& p;
  const FastDivmod& page_size;
  const Maps& maps;
  uint32_t ring;
  uint64_t* barriers;  // of the warp, one a stage
  const int32_t* pages = nullptr;
  int row = 0, head = 0;
  int first = 0, table = 0;  // with pages: lane l holds the page of the warp's tile first + l * warps
  uint32_t parity = 0;       // bit of a stage: which phase of its barrier comes next

  __device__ __forceinline__ DecodeTensorCopy(const DecodeArgs& args, const Maps& m, uint32_t ring_address, uint64_t* b)
      : p(args.params), page_size(args.page_size), maps(m), ring(ring_address), barriers(b) {
    if (threadIdx.x % 32 == 0) {
      if (threadIdx.x == 0) {
        sm90::tma_prefetch_map(&maps.k);
        sm90::tma_prefetch_map(&maps.v);
      }
#pragma unroll
      for (int s = 0; s < kStages; ++s) sm90::barrier_init(barriers + s, 1);
      sm90::barrier_init_fence();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void begin(const DecodeEntry& entry, int batch, int head_kv) {
    head = head_kv;
    row = entry.row;
    if (p.block_table != nullptr) pages = p.block_table + batch * p.block_table_stride;
    first = -1;
  }

  __device__ __forceinline__ uint32_t stage_address(int stage) const { return ring + stage * Layout::kStageBytes; }

  __device__ __forceinline__ void issue(int stage, const DecodeRun& run, int tile) {
    int slot = tile * kKeys;
    if (pages != nullptr) {
      if (first < 0 || tile >= first + 32 * kWarps) {
        first = tile;
        const int mine = tile + static_cast<int>(threadIdx.x % 32) * kWarps;
        int page = 0, unused;
        if (mine < run.end) {
          page_size(mine * kKeys, page, unused);
          table = pages[page];
        }
      }
      row = __shfl_sync(~0u, table, (tile - first) / kWarps);
      int page;
      page_size(tile * kKeys, page, slot);
    }
    if (threadIdx.x % 32 == 0) {
      uint64_t* barrier = barriers + stage;
      sm90::barrier_expect(barrier, Layout::kStageBytes);
      const uint32_t to = stage_address(stage);
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        sm90::tma_load_4d(to + panel * Layout::kPanelBytes, &maps.k, barrier, 64 * panel, slot, head, row,
                          sm90::kEvictNormal);
      }
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        sm90::tma_load_4d(to + Layout::kTileBytes + panel * Layout::kPanelBytes, &maps.v, barrier, 64 * panel, slot, head,
                          row, sm90::kEvictNormal);
      }
    }
  }

  __device__ __forceinline__ void commit() {}

  __device__ __forceinline__ void wait(int stage, int) {
    sm90::barrier_wait(barriers + stage, parity >> stage & 1u);
    parity ^= 1u << stage;
  }
};

}  // namespace vivace
