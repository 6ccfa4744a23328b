// The first warpgroup of the sm90 forward kernel: one warp loads, three inspect the blocks of V that some rows do not see.
#pragma once

#include "kernels/attention/forward_sm90_tile.cuh"
#include "kernels/attention/hidden_values.cuh"

namespace vivace::sm90 {

inline constexpr int kInspectors = 3;  // warps
inline constexpr int kInspectorBarrier = 15;

/// Loads Q once a tile, and K and V block by block, last to first. Called by one warp.
template <typename Traits>
__device__ __forceinline__ void produce(ForwardSmem<Traits>& smem, const ForwardArgs& args, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
  using Element = typename Traits::element;
  constexpr uint32_t kBlockBytes = Traits::keys * Traits::chunks * 128;
  Tile<Traits> tile;
  RingPosition<Traits::stages> kv;
  RingPosition<Traits::q_stages> q;
  RingPosition<Traits::stages> raw;
  for (TileWalk<Traits> walk; walk.next(args, tile);) {
    if ((threadIdx.x & 31) == 0) {
      const int head_kv = tile.head / args.group;
      const int q_row = tile.lengths.q_start() + tile.first_row(), q_batch = tile.lengths.q_batch(args, tile.batch);
      const int k_start = tile.lengths.k_start(), k_batch = tile.lengths.k_batch(args, tile.batch);
      auto load_block = [&](Element(*destination)[Traits::keys][64], const CUtensorMap* map, uint64_t* barrier, int block) {
        barrier_expect(barrier, kBlockBytes);
#pragma unroll
        for (int c = 0; c < Traits::chunks; ++c) {
          tma_load_4d(destination[c], map, barrier, 64 * c, k_start + block * Traits::keys, head_kv, k_batch, kEvictLast);
        }
      };
      for (int block = tile.last_block - 1; block >= tile.first_block; --block) {
        if (block == tile.last_block - 1) {
          barrier_wait(&smem.q_empty[q.stage], q.phase ^ 1);
          barrier_expect(&smem.q_full[q.stage], Traits::rows * Traits::chunks * 128);
#pragma unroll
          for (int c = 0; c < Traits::chunks; ++c) {
            tma_load_4d(smem.q[q.stage][c], q_map, &smem.q_full[q.stage], 64 * c, q_row, tile.head, q_batch, kEvictFirst);
          }
          q.advance();
        }
        barrier_wait(&smem.k_empty[kv.stage], kv.phase ^ 1);
        load_block(smem.k[kv.stage], k_map, &smem.k_full[kv.stage], block);
        barrier_wait(&smem.v_empty[kv.stage], kv.phase ^ 1);
        if (tile.inspected(args, block)) {
          load_block(smem.v[kv.stage], v_map, &smem.v_raw[raw.stage], block);
          raw.advance();
        } else {
          load_block(smem.v[kv.stage], v_map, &smem.v_full[kv.stage], block);
        }
        kv.advance();
      }
    }
    __syncwarp();
  }
}

/// Makes a block of V harmless to rows that do not see all of it: keys past the end become 0 (what stands there belongs to
/// another sequence), and so do elements that are not finite: 0 * NaN is NaN. Returns whether there were any of the latter
/// in this warp's part; the consumers then add them to the rows that see them.
template <typename Traits>
__device__ __forceinline__ bool inspect_block(typename Traits::element (*v)[Traits::keys][64], int keys_left, int thread) {
  using Element = typename Traits::element;
  constexpr int kBytes = Traits::chunks * Traits::keys * 128;
  constexpr int kStride = 16 * 32 * kInspectors;
  char* const block = reinterpret_cast<char*>(v);
  uint32_t bad = 0;
#pragma unroll 2
  for (int at = 16 * thread; at < kBytes; at += kStride) {
    uint4* const piece = reinterpret_cast<uint4*>(block + at);
    if (Traits::ragged && (at / 128) % Traits::keys >= keys_left) {
      *piece = uint4{0, 0, 0, 0};
    } else {
      const uint4 x = *piece;
      bad |= not_finite<Element>(x.x) | not_finite<Element>(x.y) | not_finite<Element>(x.z) | not_finite<Element>(x.w);
    }
  }
  if (!__any_sync(0xffffffffu, bad != 0)) return false;
#pragma unroll 1
  for (int at = 16 * thread; at < kBytes; at += kStride) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      uint32_t* const pair = reinterpret_cast<uint32_t*>(block + at + 4 * i);
      *pair &= ~((not_finite<Element>(*pair) >> 15) * 0xffffu);
    }
  }
  return true;
}

/// Writes the rows of a tile that sees nothing: output 0, lse -inf.
template <typename Traits>
__device__ __forceinline__ void store_nothing(const ForwardArgs& args, const Tile<Traits>& tile, int thread) {
  const int end = min(tile.first_row() + Traits::rows, tile.lengths.q_rows(args));
  auto* out = static_cast<typename Traits::element*>(args.out) +
              tile.lengths.q_batch(args, tile.batch) * args.out_stride[0] + tile.head * args.out_stride[2];
  float* lse = args.lse + tile.lengths.q_batch(args, tile.batch) * args.lse_batch_stride + tile.head * args.lse_head_stride;
  for (int row = tile.first_row() + thread; row < end; row += 32 * kInspectors) {
    const int64_t at = tile.lengths.q_start() + row;
    lse[at] = -INFINITY;
    for (int c = 0; c < args.head_dim; c += 8)
      *reinterpret_cast<uint4*>(out + at * args.out_stride[1] + c) = uint4{0, 0, 0, 0};
  }
}

/// Called by kInspectors warps, beside the loads and the consumers. They wake for inspected blocks alone.
template <typename Traits>
__device__ __forceinline__ void inspect(ForwardSmem<Traits>& smem, const ForwardArgs& args) {
  const int thread = static_cast<int>(threadIdx.x) - 32;
  Tile<Traits> tile;
  RingPosition<Traits::stages> kv, raw;
  int number = 0;  // of the tile
  for (TileWalk<Traits> walk; walk.template next<true>(args, tile);) {
    if (tile.empty()) {
      store_nothing(args, tile, thread);
      continue;
    }
    bool clean = true;
    for (int block = tile.last_block - 1; block >= tile.first_block; --block) {
      if (tile.inspected(args, block)) {
        barrier_wait(&smem.v_raw[raw.stage], raw.phase);
        const bool bad = inspect_block<Traits>(smem.v[kv.stage], tile.lengths.key_end(args) - block * Traits::keys, thread);
        fence_async_proxy();
        if (clean && thread == 0) smem.removed[number % kRemovedRing] = 0;
        clean = false;
        named_barrier_sync(kInspectorBarrier, 32 * kInspectors);
        if (bad) smem.removed[number % kRemovedRing] = 1;
        named_barrier_sync(kInspectorBarrier, 32 * kInspectors);
        if (thread == 0) barrier_arrive(&smem.v_full[kv.stage]);
        raw.advance();
      }
      kv.advance();
    }
    ++number;
  }
}

}  // namespace vivace::sm90
