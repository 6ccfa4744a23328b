// One consumer warpgroup of the sm90 forward kernel: 64 query rows of each tile.
#pragma once

#include "kernels/attention/forward_sm90_softmax.cuh"
#include "kernels/attention/forward_sm90_tile.cuh"
#include "kernels/attention/hidden_values.cuh"
#include "kernels/common/wgmma.cuh"

namespace vivace::sm90 {

/// The blocks of all its tiles are one sequence: the first scores of a tile are computed while the last product of the tile
/// before runs.
template <typename Traits>
struct Consumer {
  using Element = typename Traits::element;
  using PV = Wgmma<Element, Traits::head_dim>;
  using Stage = RingPosition<Traits::stages>;
  static constexpr int kScores = Traits::keys / 2, kOutputs = Traits::head_dim / 2;  // of a thread
  static constexpr uint32_t kKeyChunkBytes = Traits::keys * 128;
  static constexpr int kAllThreads = 128 * Traits::consumers;
  static constexpr int kAllBarrier = 14;

  ForwardSmem<Traits>& smem;
  const ForwardArgs& args;
  const CUtensorMap *q_map, *k_map, *v_map, *o_map;
  // From lane 0: tells the compiler that a warp never diverges over it.
  const int consumer = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  const int lane = static_cast<int>(threadIdx.x) & 31;
  Stage kv;                          // of the block whose scores come next
  RingPosition<Traits::q_stages> q;  // of the tile whose scores come next
  int tiles = 0;                     // begun
  TileRange range;                   // the blocks of the latest that these rows see
  float o[kOutputs];
  uint32_t p[Traits::keys / 16][4];  // probabilities as the A operand
  uint32_t out[kOutputs / 2];        // the result of the tile before, packed
  Softmax softmax;                   // of the latest scores
  float rescale[2];                  // of o, when a maximum grew
  bool accumulate = false;           // whether o holds products of this tile already: not at its first block
  bool half = false;                 // whether p has the first half of the block's keys alone
  bool pending = false;              // whether `out` is still to be stored

  __device__ __forceinline__ int warp() const { return (static_cast<int>(threadIdx.x) / 32) & 3; }
  __device__ __forceinline__ bool leads() const { return (threadIdx.x & 127) == 0; }
  /// The tile that was begun `back` before the latest.
  __device__ __forceinline__ const Tile<Traits>& tile(int back) const { return smem.tiles[(tiles - 1 - back) % kTileRing]; }
  __device__ __forceinline__ int first_row(const Tile<Traits>& tile) const { return tile.first_row() + consumer * 64; }
  /// The upper of a thread's two rows, 8 apart.
  __device__ __forceinline__ int row_of(const Tile<Traits>& tile) const { return first_row(tile) + warp() * 16 + lane / 4; }
  __device__ __forceinline__ void release(uint64_t* empty) const {
    if (lane == 0) barrier_arrive(empty);
  }

  // Barrier 1 + i lets consumer i issue its products; all consumers take part in each.
  __device__ __forceinline__ void start_turns() const {
    if constexpr (Traits::turns) {
      // The first turn of consumer i needs the arrival of those after it.
#pragma unroll
      for (int i = 0; i < Traits::consumers - 1; ++i) {
        if (consumer > i) named_barrier_arrive(1 + i, kAllThreads);
      }
    }
  }
  __device__ __forceinline__ void take_turn() const {
    if constexpr (Traits::turns) named_barrier_sync(1 + consumer, kAllThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (Traits::turns) {
#pragma unroll
      for (int i = 1; i < Traits::consumers; ++i) named_barrier_arrive(1 + (consumer + i) % Traits::consumers, kAllThreads);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void issue_qk(float (&s)[kCount], int q_stage, int k_stage) {
    const uint32_t q_low = wgmma_descriptor_low(smem.q[q_stage], 16) + consumer * (64 * 128 / 16);
    const uint32_t k_low = wgmma_descriptor_low(smem.k[k_stage], 16);
#pragma unroll
    for (int i = 0; i < Traits::head_dim / 16; ++i) {
      const uint64_t a = wgmma_descriptor_of(q_low + ((i / 4) * Traits::rows * 128 + (i % 4) * 32) / 16);
      const uint64_t b = wgmma_descriptor_of(k_low + ((i / 4) * kKeyChunkBytes + (i % 4) * 32) / 16);
      Wgmma<Element, 2 * kCount>::ss(s, a, b, i != 0);
    }
    wgmma_commit();
  }
  template <bool kHalf>
  __device__ __forceinline__ void issue_pv(int stage) {
    const uint32_t v_low = wgmma_descriptor_low(smem.v[stage], kKeyChunkBytes);
    constexpr int kSteps = Traits::keys / 16 / (kHalf ? 2 : 1);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      PV::rs(o, p[i], wgmma_descriptor_of(v_low + i * 16 * 128 / 16), accumulate || i != 0);
    }
    wgmma_commit();
  }
  /// Scores to p.
  template <int kCount>
  __device__ __forceinline__ void exponentiate(float (&s)[kCount]) {
    softmax.template exponentiate<Element>(s, args.scale_log2, p);
    // Where the tile has no other block, the product with V does not know that it is half.
#pragma unroll
    for (int i = kCount / 8; i < Traits::keys / 16; ++i) p[i][0] = p[i][1] = p[i][2] = p[i][3] = 0;
  }
  __device__ __forceinline__ void rescale_output() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[(i >> 1) & 1];
  }

  /// Moves to the next tile and the first block that this warpgroup's rows see; false after the last tile.
  __device__ __forceinline__ bool begin_tile(int& block) {
    barrier_wait(&smem.q_full[q.stage], q.phase);
    const Tile<Traits>& next = smem.tiles[tiles % kTileRing];
    if (next.batch < 0) return false;
    range = smem.ranges[tiles % kTileRing][consumer];
    ++tiles;
    block = range.last - 1;
    if constexpr (Traits::masked) {
      if (!range.idle) {
        static_assert((Traits::rows - 64 + Traits::keys - 1) / Traits::keys < Traits::stages);
        for (int i = next.last_block - range.last; i > 0; --i) pass_over();
      }
    }
    return true;
  }

  /// Leaves a block past the diagonal to the other warpgroups. The product of the block before may still be due, in whose
  /// stage V then waits: so fewer in a row than there are stages.
  __device__ __forceinline__ void pass_over() {
    take_turn();
    pass_turn();
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    release(&smem.k_empty[kv.stage]);
    barrier_wait(&smem.v_full[kv.stage], kv.phase);
    release(&smem.v_empty[kv.stage]);
    kv.advance();
  }

  /// Leaves the latest tile to the other warpgroups. No product is due.
  __device__ __forceinline__ void pass_over_tile() {
    for (int i = tile(0).last_block - tile(0).first_block; i > 0; --i) pass_over();
    release(&smem.q_empty[q.stage]);
    q.advance();
  }

  /// The result of a tile: the sum over the four threads of a row, lse, and o / sum into `out`.
  __device__ __forceinline__ void finish(const Tile<Traits>& tile, const Softmax& softmax) {
    const int q_rows = tile.lengths.q_rows(args), row = row_of(tile);
    float* const lse = args.lse + tile.lengths.q_batch(args, tile.batch) * args.lse_batch_stride +
                       tile.head * args.lse_head_stride + tile.lengths.q_start();
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane % 4 == 0 && row + 8 * r < q_rows) {
        lse[row + 8 * r] = sum == 0.0f ? -INFINITY : softmax.max[r] * args.softmax_scale + logf(sum);
      }
    }
    uint32_t finite = 0;
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) {
      out[i] = pack(o[2 * i] * inverse[i & 1], o[2 * i + 1] * inverse[i & 1], Element{});
      if constexpr (Traits::masked) finite = finite_sum<Element>(out[i], finite);
    }
    if constexpr (Traits::masked) {
      if (finite & 0x7fff7fffu) atomicOr(&smem.bad_tiles[tile.number % kBits / 32], 1u << tile.number % 32);
    }
    pending = true;
  }

  /// `out` through shared memory to TMA; where there is no buffer for that, or the 64 rows reach into the next sequence,
  /// from registers to global memory.
  __device__ __forceinline__ void store(const Tile<Traits>& tile) {
    pending = false;
    const int q_batch = tile.lengths.q_batch(args, tile.batch), q_start = tile.lengths.q_start();
    if (!Traits::stores_tma || (Traits::ragged && first_row(tile) + 64 > tile.lengths.q_rows(args))) {
      const int q_rows = tile.lengths.q_rows(args), row = row_of(tile);
      Element* to = static_cast<Element*>(args.out) + q_batch * args.out_stride[0] + (q_start + row) * args.out_stride[1] +
                    tile.head * args.out_stride[2] + 2 * (lane & 3);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= q_rows) continue;
#pragma unroll
        for (int j = 0; j < Traits::head_dim / 8; ++j) {
          if (8 * j < args.head_dim) *reinterpret_cast<uint32_t*>(to + 8 * r * args.out_stride[1] + 8 * j) = out[2 * j + r];
        }
      }
      return;
    }
    if constexpr (Traits::stores_tma) {
      if (leads()) tma_store_wait_read();  // the store before has read this buffer
      named_barrier_sync(8 + consumer, 128);
      const int tile_row = warp() * 16 + (lane & 15);
#pragma unroll
      for (int j = 0; j < Traits::head_dim / 16; ++j) {
        // stmatrix of 16 columns: rows 0-7 and 8-15 of columns 16 j ... + 7, then of + 8 ... + 15
        const int piece = (2 * j + lane / 16) & 7;  // of 16 bytes within the 128-byte row
        stmatrix_x4(&smem.o[consumer][j / 4][tile_row][(piece ^ (tile_row & 7)) * 8], out[4 * j], out[4 * j + 1],
                    out[4 * j + 2], out[4 * j + 3]);
      }
      fence_async_proxy();
      named_barrier_sync(8 + consumer, 128);
      if (leads()) {
#pragma unroll
        for (int c = 0; c < Traits::chunks; ++c) {
          if (64 * c < args.head_dim) {
            tma_store_4d(o_map, smem.o[consumer][c], 64 * c, q_start + first_row(tile), tile.head, q_batch);
          }
        }
        tma_store_commit();
      }
    }
  }

  /// Hides keys of the latest tile's `block`, then takes in the maxima of its scores.
  template <bool kFirst, bool kMask, int kCount>
  __device__ __forceinline__ bool take_scores(float (&s)[kCount], int block) {
    if constexpr (kMask) {
      if (block >= range.whole_end || block < range.whole_begin) {
        mask_block<Traits, kCount>(s, args, tile(0), row_of(tile(0)), block * Traits::keys);
      }
    }
    return softmax.template take_maxima<kFirst>(s, args.scale_log2, rescale);
  }

  /// One step of the sequence: the scores of the block at `kv` are computed, then (asynchronously) o += p V of the block
  /// before, at `v`; meanwhile those scores are made probabilities. kNewTile: they are the first of the latest tile, and o
  /// is the tile before's result. kEdge: a mask may be due, or p may be of a tile's first block.
  template <bool kNewTile, bool kEdge, bool kHalf = false, bool kHalfBefore = false>
  __device__ __forceinline__ void step(const Stage& v, int block) {
    constexpr int kCount = kHalf ? kScores / 2 : kScores;
    float s[kCount];  // scores, then probabilities
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    take_turn();
    wgmma_hold(s);
    wgmma_hold(o);
    wgmma_fence();
    issue_qk(s, q.stage, kv.stage);
    barrier_wait(&smem.v_full[v.stage], v.phase);
    wgmma_fence();
    issue_pv<kHalfBefore>(v.stage);
    pass_turn();
    if constexpr (kEdge && Traits::stores_late) {
      if (pending) store(tile(kNewTile ? 2 : 1));  // while the products run
    }
    wgmma_wait<1>();
    wgmma_hold(s);
    release(&smem.k_empty[kv.stage]);
    const Softmax old = softmax;
    if constexpr (kNewTile) softmax = Softmax{};
    const bool grew = take_scores<kNewTile, kEdge>(s, block);
    wgmma_wait<0>();
    wgmma_hold(o);
    release(&smem.v_empty[v.stage]);
    if constexpr (kNewTile) {
      finish(tile(1), old);
      if constexpr (!Traits::stores_late) store(tile(1));
    } else if (grew) {
      rescale_output();
    }
    accumulate = !kNewTile;
    exponentiate(s);
    if constexpr (kEdge) half = kHalf;
  }

  /// The first scores of all, or after an idle tile, with nothing to overlap with.
  template <bool kHalf>
  __device__ __forceinline__ void first_step(int block) {
    float s[kHalf ? kScores / 2 : kScores];
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    take_turn();
    wgmma_hold(s);
    wgmma_fence();
    issue_qk(s, q.stage, kv.stage);
    pass_turn();
    wgmma_wait<0>();
    wgmma_hold(s);
    release(&smem.k_empty[kv.stage]);
    take_scores<true, true>(s, block);
    exponentiate(s);
    half = kHalf;
    accumulate = false;
  }

  /// The last product before an idle tile or the end, of the tile that was begun `back` before the latest.
  __device__ __forceinline__ void last_step(const Stage& v, int back) {
    barrier_wait(&smem.v_full[v.stage], v.phase);
    wgmma_hold(o);
    wgmma_fence();
    issue_pv<false>(v.stage);
    if (pending) store(tile(back + 1));
    wgmma_wait<0>();
    wgmma_hold(o);
    release(&smem.v_empty[v.stage]);
    finish(tile(back), softmax);
    store(tile(back));
  }

  /// The blocks of the latest tile after its first.
  __device__ __forceinline__ void walk_blocks(int& block) {
    auto next = [&] {
      --block;
      const Stage v = kv;
      kv.advance();
      return v;
    };
    while (block > range.first) {
      if (Traits::halves && half) {
        if constexpr (Traits::halves) step<false, true, false, true>(next(), block);
      } else if (((Traits::halves || Traits::stores_late) && !accumulate) || block > range.whole_end ||
                 block <= range.whole_begin) {
        step<false, true>(next(), block);
      } else {
        const int last = max(range.whole_begin, range.first);
        do {
          step<false, false>(next(), block);
        } while (block > last);
      }
    }
  }

  __device__ __forceinline__ void run() {
    start_turns();
    int block;
    bool more = begin_tile(block);
    while (more) {
      if (range.idle) {
        pass_over_tile();
        more = begin_tile(block);
        continue;
      }
      softmax = Softmax{};
      if (Traits::halves && range.half) {
        if constexpr (Traits::halves) first_step<true>(block);
      } else {
        first_step<false>(block);
      }
      while (true) {
        walk_blocks(block);
        const Stage v = kv;
        kv.advance();
        release(&smem.q_empty[q.stage]);
        q.advance();
        more = begin_tile(block);
        if (!more || range.idle) {
          last_step(v, more ? 1 : 0);
          break;
        }
        if (Traits::halves && range.half) {
          if constexpr (Traits::halves) step<true, true, true>(v, block);
        } else {
          step<true, true>(v, block);
        }
      }
    }
    if constexpr (Traits::masked) redo_bad_tiles();
    if (leads()) tma_store_wait_read();  // shared memory must live until the last store has read it
  }

  // A key that a row does not see has probability 0, but 0 * NaN is NaN. So tiles whose output is not finite are done again,
  // with what is not finite in V set to 0; what was taken out is added to the rows that see it. The same arithmetic in the
  // same order: other rows get the same bits as without. All consumers together, when nothing else uses shared memory.

  __device__ __forceinline__ void redo_bad_tiles() {
    named_barrier_sync(kAllBarrier, kAllThreads);
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < kBits / 32; i += 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(&smem.bad_tiles[i]);
      any |= x.x | x.y | x.z | x.w;
    }
    if (any == 0) return;
    if (leads()) tma_store_wait();
    uint32_t phase = 0;
    Tile<Traits> tile;
#pragma unroll 1
    for (TileWalk<Traits> walk; walk.next(args, tile);) {
      if (smem.bad_tiles[tile.number % kBits / 32] & (1u << tile.number % 32)) redo(tile, phase);
    }
  }

  __device__ __forceinline__ void redo(const Tile<Traits>& tile, uint32_t& phase) {
    const int thread = static_cast<int>(threadIdx.x) - 128;
    named_barrier_sync(kAllBarrier, kAllThreads);  // the tile before is stored
    for (int i = thread; i < kBits / 32; i += kAllThreads) smem.bad_blocks[i] = 0;
    if (thread == 0) smem.tiles[0] = tile;
    tiles = 1;
    range = TileRange(args, tile, consumer);
    accumulate = false;
#pragma unroll 1
    for (int block = tile.last_block - 1; block >= tile.first_block; --block) {
      named_barrier_sync(kAllBarrier, kAllThreads);  // the block before is used up
      if (thread == 0) load_again(tile, block);
      barrier_wait(&smem.redo_full, phase);
      phase ^= 1;
      if (remove_bad(thread)) atomicOr(&smem.bad_blocks[block % kBits / 32], 1u << block % 32);
      fence_async_proxy();
      named_barrier_sync(kAllBarrier, kAllThreads);
      if (block < range.last) redo_block(block);
    }
    add_removed(tile);
    finish(tile, softmax);
    store(tile);
    if (leads()) tma_store_wait();
  }

  __device__ __forceinline__ void load_again(const Tile<Traits>& tile, int block) {
    constexpr uint32_t kBlockBytes = Traits::keys * Traits::chunks * 128, kQBytes = Traits::rows * Traits::chunks * 128;
    const bool first = block == tile.last_block - 1;
    barrier_expect(&smem.redo_full, 2 * kBlockBytes + (first ? kQBytes : 0));
    const TilePlace place(args, tile);
#pragma unroll
    for (int c = 0; c < Traits::chunks; ++c) {
      if (first) place.load_q(smem.q[0][c], q_map, &smem.redo_full, c);
      place.load_kv(smem.k[0][c], k_map, &smem.redo_full, c, block * Traits::keys);
      place.load_kv(smem.v[0][c], v_map, &smem.redo_full, c, block * Traits::keys);
    }
  }

  /// Sets what is not finite in the block of V to 0; whether there was any in this thread's part.
  __device__ __forceinline__ bool remove_bad(int thread) const {
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

  __device__ __forceinline__ void redo_block(int block) {
    float s[kScores];
    wgmma_hold(s);
    wgmma_fence();
    issue_qk(s, 0, 0);
    wgmma_wait<0>();
    wgmma_hold(s);
    if (!accumulate) softmax = Softmax{};
    if (take_scores<false, true>(s, block) && accumulate) rescale_output();
    exponentiate(s);
    wgmma_hold(o);
    wgmma_fence();
    issue_pv<false>(0);
    wgmma_wait<0>();
    wgmma_hold(o);
    accumulate = true;
  }

  /// Adds to o the elements that were taken out of V, for the rows that see them: read from global memory.
  __device__ __forceinline__ void add_removed(const Tile<Traits>& tile) {
    const Element* v = static_cast<const Element*>(args.v) + tile.lengths.k_batch(args, tile.batch) * args.v_stride[0] +
                       tile.lengths.k_start() * args.v_stride[1] + tile.head / args.group * args.v_stride[2];
    int begin[2], end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) tile.visible(args, row_of(tile) + 8 * r, begin[r], end[r]);
#pragma unroll 1
    for (int key = tile.first_block * Traits::keys; key < tile.lengths.key_end(args); ++key) {
      const int bit = key / Traits::keys % kBits;
      if ((smem.bad_blocks[bit / 32] & (1u << bit % 32)) == 0) continue;
      const Element* at = v + key * args.v_stride[1] + 2 * (lane & 3);
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
          if (bad & 0x8000u) o[4 * j + 2 * r] += x.x;
          if (bad & 0x80000000u) o[4 * j + 2 * r + 1] += x.y;
        }
      }
    }
  }
};

}  // namespace vivace::sm90
