// Keeps NaN and infinities of V from rows that do not see them, in the sm90 forward kernel: a key that a row does not see
// has probability 0, but 0 * NaN is NaN. So tiles whose output is not finite are done again, with what is not finite in V
// set to 0; what was taken out is added to the rows that see it. The same arithmetic in the same order: other rows get the
// same bits as without. All consumers together, when nothing else uses shared memory.
#pragma once

#include "kernels/attention/forward_sm90_consumer.cuh"

namespace vivace::sm90 {

template <typename Traits>
struct Redo {
  using Element = typename Traits::element;
  static constexpr int kAllThreads = 128 * Traits::consumers;
  static constexpr int kAllBarrier = 14;

  Consumer<Traits>& consumer;
  ForwardSmem<Traits>& smem;
  const ForwardArgs& args;
  const int thread = static_cast<int>(threadIdx.x) - 128;

  /// Called by all consumers, when their tiles are stored.
  __device__ __forceinline__ void run() {
    named_barrier_sync(kAllBarrier, kAllThreads);
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kBits / 32; i += 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(&smem.bad_tiles[i]);
      any |= x.x | x.y | x.z | x.w;
    }
    if (any == 0) return;
    if (consumer.leads()) tma_store_wait();
    uint32_t phase = 0;
    Tile<Traits> tile;
#pragma unroll 1
    for (TileWalk<Traits> walk; walk.next(args, tile);) {
      if (smem.bad_tiles[tile.number % kBits / 32] & (1u << tile.number % 32)) redo_tile(tile, phase);
    }
  }

 private:
  __device__ __forceinline__ void redo_tile(const Tile<Traits>& tile, uint32_t& phase) {
    named_barrier_sync(kAllBarrier, kAllThreads);  // the tile before is stored
    for (int i = thread; i < kBits / 32; i += kAllThreads) smem.bad_blocks[i] = 0;
    if (thread == 0) smem.tiles[0] = tile;
    consumer.tiles = 1;
    consumer.range = TileRange(args, tile, consumer.consumer);
    consumer.accumulate = false;
    consumer.softmax = Softmax{};
#pragma unroll 1
    for (int block = tile.last_block - 1; block >= tile.first_block; --block) {
      named_barrier_sync(kAllBarrier, kAllThreads);  // the block before is used up
      if (thread == 0) load(tile, block);
      barrier_wait(&smem.redo_full, phase);
      phase ^= 1;
      if (remove_bad()) atomicOr(&smem.bad_blocks[block % kBits / 32], 1u << block % 32);
      fence_async_proxy();
      named_barrier_sync(kAllBarrier, kAllThreads);
      if (block < consumer.range.last) take_block(block);
    }
    add_removed(tile);
    consumer.finish_rows(tile);
    consumer.store(tile);
    if (consumer.leads()) tma_store_wait();
  }

  __device__ __forceinline__ void load(const Tile<Traits>& tile, int block) {
    constexpr uint32_t kBlockBytes = Traits::keys * Traits::chunks * 128, kQBytes = Traits::rows * Traits::chunks * 128;
    const bool first = block == tile.last_block - 1;
    barrier_expect(&smem.redo_full, 2 * kBlockBytes + (first ? kQBytes : 0));
    const TilePlace place(args, tile);
#pragma unroll
    for (int c = 0; c < Traits::chunks; ++c) {
      if (first) place.load_q(smem.q[0][c], consumer.q_map, &smem.redo_full, c);
      place.load_kv(smem.k[0][c], consumer.k_map, &smem.redo_full, c, block * Traits::keys);
      place.load_kv(smem.v[0][c], consumer.v_map, &smem.redo_full, c, block * Traits::keys);
    }
  }

  /// Sets what is not finite in the block of V to 0; whether there was any in this thread's part.
  __device__ __forceinline__ bool remove_bad() const {
    constexpr int kPairs = Traits::chunks * Traits::keys * 32;
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(smem.v[0]);
    bool any = false;
#pragma unroll 4
    for (int i = thread; i < kPairs; i += kAllThreads) {
      const uint32_t pair = pairs[i], bad = not_finite<Element>(pair);
      if (bad != 0) pairs[i] = pair & ~((bad >> 15) * 0xffffu);
      any |= bad != 0;
    }
    return any;
  }

  /// What first_step and step do with a block, one after another.
  __device__ __forceinline__ void take_block(int block) {
    float s[Consumer<Traits>::kScores];
    wgmma_hold(s);
    wgmma_fence();
    consumer.issue_qk(s, 0, 0);
    wgmma_wait<0>();
    wgmma_hold(s);
    const TileRange& range = consumer.range;
    bool grew;
    if (block == range.last - 1 || block >= range.whole_end || block < range.whole_begin) {
      grew = consumer.template take_scores<false>(s, block);
      consumer.softmax.template exponentiate<Element>(s, args.scale_log2, consumer.p);
    } else {
      grew = consumer.softmax.template exponentiate_unseen<Element>(s, args.scale_log2, consumer.p, consumer.rescale);
    }
    if (grew && consumer.accumulate) consumer.rescale_output();
    wgmma_hold(consumer.o);
    wgmma_fence();
    consumer.issue_pv(0);
    wgmma_wait<0>();
    wgmma_hold(consumer.o);
    consumer.accumulate = true;
  }

  /// Adds to o the elements that were taken out of V, for the rows that see them: read from global memory.
  __device__ __forceinline__ void add_removed(const Tile<Traits>& tile) {
    const Element* v = static_cast<const Element*>(args.v) + tile.lengths.k_batch(args, tile.batch) * args.v_stride[0] +
                       tile.lengths.k_start() * args.v_stride[1] + tile.head / args.group * args.v_stride[2];
    int begin[2], end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) tile.visible(args, consumer.row_of(tile) + 8 * r, begin[r], end[r]);
#pragma unroll 1
    for (int key = tile.first_block * Traits::keys; key < tile.lengths.key_end(args); ++key) {
      const int bit = key / Traits::keys % kBits;
      if ((smem.bad_blocks[bit / 32] & (1u << bit % 32)) == 0) continue;
      const Element* at = v + key * args.v_stride[1] + 2 * (consumer.lane & 3);
#pragma unroll
      for (int j = 0; j < Traits::head_dim / 8; ++j) {
        if (8 * j >= args.head_dim) break;
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(at + 8 * j);
        const uint32_t bad = not_finite<Element>(pair);
        if (bad == 0) continue;
        const float2 x = unpack2<Element>(pair);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (key < begin[r] || key >= end[r]) continue;
          if (bad & 0x8000u) consumer.o[4 * j + 2 * r] += x.x;
          if (bad & 0x80000000u) consumer.o[4 * j + 2 * r + 1] += x.y;
        }
      }
    }
  }
};

}  // namespace vivace::sm90
