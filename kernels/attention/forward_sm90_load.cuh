// The first warpgroup of the sm90 forward kernel: one warp loads Q and K, one V, and two write the rows of tiles that see
// nothing.
#pragma once

#include "kernels/attention/forward_sm90_tile.cuh"

namespace vivace::sm90 {

/// Loads the blocks of K, or of V, of one place, from the last to the first.
template <typename Traits>
struct BlockLoader {
  using Block = typename Traits::element[Traits::chunks][Traits::keys][64];
  Block* blocks;
  uint64_t *full, *empty;
  const CUtensorMap* map;
  RingPosition<Traits::stages> stage;

  __device__ __forceinline__ void operator()(const ForwardArgs& args, const Tile<Traits>& tile) {
    const TilePlace place(args, tile);
    for (int block = tile.last_block - 1; block >= tile.first_block; --block) {
      barrier_wait(&empty[stage.stage], stage.phase ^ 1);
      barrier_expect(&full[stage.stage], Traits::keys * Traits::chunks * 128);
#pragma unroll
      for (int c = 0; c < Traits::chunks; ++c) {
        place.load_kv(blocks[stage.stage][c], map, &full[stage.stage], c, block * Traits::keys);
      }
      stage.advance();
    }
  }
};

/// Loads Q once a tile, and K block by block; tells the consumers of each tile, and of the end. Called by one warp.
template <typename Traits>
__device__ __forceinline__ void produce_qk(ForwardSmem<Traits>& smem, const ForwardArgs& args, const CUtensorMap* q_map,
                                           const CUtensorMap* k_map) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  BlockLoader<Traits> load_k{smem.k, smem.k_full, smem.k_empty, k_map, {}};
  RingPosition<Traits::q_stages> q;
  Tile<Traits> tile;
  int tiles = 0;
  for (TileWalk<Traits> walk; walk.next(args, tile); ++tiles) {
    barrier_wait(&smem.q_empty[q.stage], q.phase ^ 1);
    // Every lane that writes arrives.
    if (lane == 0) smem.tiles[tiles % kTileRing] = tile;
    if (lane < Traits::consumers) smem.ranges[tiles % kTileRing][lane] = TileRange(args, tile, lane);
    if (lane > 0 && lane < Traits::consumers) barrier_arrive(&smem.q_full[q.stage]);
    if (lane == 0) {
      barrier_expect(&smem.q_full[q.stage], Traits::rows * Traits::chunks * 128);
      const TilePlace place(args, tile);
#pragma unroll
      for (int c = 0; c < Traits::chunks; ++c) place.load_q(smem.q[q.stage][c], q_map, &smem.q_full[q.stage], c);
      load_k(args, tile);
    }
    q.advance();
    __syncwarp();
  }
  barrier_wait(&smem.q_empty[q.stage], q.phase ^ 1);
  if (lane == 0) smem.tiles[tiles % kTileRing].batch = -1;
  if (lane < Traits::consumers) barrier_arrive(&smem.q_full[q.stage]);
}

/// Loads V block by block. Called by one warp: V is due later than K of the same block, and must not hold up the next.
template <typename Traits>
__device__ __forceinline__ void produce_v(ForwardSmem<Traits>& smem, const ForwardArgs& args, const CUtensorMap* v_map) {
  BlockLoader<Traits> load_v{smem.v, smem.v_full, smem.v_empty, v_map, {}};
  RingPosition<Traits::q_stages> q;
  for (int tiles = 0;; ++tiles) {
    barrier_wait(&smem.q_full[q.stage], q.phase);  // for the tile's place
    const Tile<Traits> tile = smem.tiles[tiles % kTileRing];
    if (tile.batch < 0) break;
    __syncwarp();
    if ((threadIdx.x & 31) == 0) {
      barrier_arrive(&smem.q_empty[q.stage]);  // consumers may leave Q before the last V is due
      load_v(args, tile);
    }
    __syncwarp();
    q.advance();
  }
}

inline constexpr int kIdleThreads = 64;

/// Writes the rows of a tile that sees nothing: output 0, lse -inf.
template <typename Traits>
__device__ __forceinline__ void store_nothing(const ForwardArgs& args, const Tile<Traits>& tile, int thread) {
  const int end = min(tile.first_row() + Traits::rows, tile.lengths.q_rows(args));
  auto* out = static_cast<typename Traits::element*>(args.out) +
              tile.lengths.q_batch(args, tile.batch) * args.out_stride[0] + tile.head * args.out_stride[2];
  float* lse = args.lse + tile.lengths.q_batch(args, tile.batch) * args.lse_batch_stride + tile.head * args.lse_head_stride;
#pragma unroll 1
  for (int row = tile.first_row() + thread; row < end; row += kIdleThreads) {
    const int64_t at = tile.lengths.q_start() + row;
    lse[at] = -INFINITY;
#pragma unroll 1
    for (int c = 0; c < args.head_dim; c += 8)
      *reinterpret_cast<uint4*>(out + at * args.out_stride[1] + c) = uint4{0, 0, 0, 0};
  }
}

/// Called by the two warps beside those that load.
template <typename Traits>
__device__ __forceinline__ void store_empty_tiles(const ForwardArgs& args) {
  // Where there are as many keys as queries, every row sees its own position.
  if (!Traits::ragged && args.seqlen_k >= args.seqlen_q) return;
  Tile<Traits> tile;
  for (TileWalk<Traits> walk; walk.template next<true>(args, tile);) {
    if (tile.empty()) store_nothing(args, tile, static_cast<int>(threadIdx.x) - 64);
  }
}

}  // namespace vivace::sm90
