// One consumer warpgroup of the sm90 forward kernel: 64 query rows of each tile.
#pragma once

#include "kernels/attention/forward_sm90_softmax.cuh"
#include "kernels/attention/forward_sm90_tile.cuh"
#include "kernels/attention/hidden_values.cuh"
#include "kernels/common/wgmma.cuh"

namespace vivace::sm90 {

/// The blocks of all its tiles are one sequence: the first scores of a tile are computed while the last product of the tile
/// before runs, where the tile's Q is there already (two buffers).
template <typename Traits>
struct Consumer {
  using Element = typename Traits::element;
  using PV = Wgmma<Element, Traits::head_dim>;
  using Stage = RingPosition<Traits::stages>;
  static constexpr int kScores = Traits::keys / 2, kOutputs = Traits::head_dim / 2;  // of a thread
  static constexpr uint32_t kKeyChunkBytes = Traits::keys * 128;
  static constexpr int kAllThreads = 128 * Traits::consumers;

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
  Softmax softmax;                   // of the latest scores
  float rescale[2];                  // of o, when a maximum grew
  float inverse[2];                  // 1 / sum of the rows of a tile that ends
  bool accumulate = false;           // whether o holds products of this tile already: not at its first block

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
  __device__ __forceinline__ void leave_q() {
    release(&smem.q_empty[q.stage]);
    q.advance();
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

  __device__ __forceinline__ void issue_qk(float (&s)[kScores], int q_stage, int k_stage) {
    const uint32_t q_low = wgmma_descriptor_low(smem.q[q_stage], 16) + consumer * (64 * 128 / 16);
    const uint32_t k_low = wgmma_descriptor_low(smem.k[k_stage], 16);
#pragma unroll
    for (int i = 0; i < Traits::head_dim / 16; ++i) {
      const uint64_t a = wgmma_descriptor_of(q_low + ((i / 4) * Traits::rows * 128 + (i % 4) * 32) / 16);
      const uint64_t b = wgmma_descriptor_of(k_low + ((i / 4) * kKeyChunkBytes + (i % 4) * 32) / 16);
      Wgmma<Element, Traits::keys>::ss(s, a, b, i != 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_pv(int stage) {
    const uint32_t v_low = wgmma_descriptor_low(smem.v[stage], kKeyChunkBytes);
#pragma unroll
    for (int i = 0; i < Traits::keys / 16; ++i) {
      PV::rs(o, p[i], wgmma_descriptor_of(v_low + i * 16 * 128 / 16), accumulate || i != 0);
    }
    wgmma_commit();
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
    leave_q();
  }

  /// What is known of a tile's result before its last product: the sums of its rows, over the four threads of each, and lse.
  __device__ __forceinline__ void finish_rows(const Tile<Traits>& tile) {
    const int q_rows = tile.lengths.q_rows(args), row = row_of(tile);
    float* const lse = args.lse + tile.lengths.q_batch(args, tile.batch) * args.lse_batch_stride +
                       tile.head * args.lse_head_stride + tile.lengths.q_start();
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
  }

  /// The result, o / sum, of a tile: through shared memory to TMA; where there is no buffer for that, or the 64 rows reach
  /// into the next sequence, from registers to global memory.
  __device__ __forceinline__ void store(const Tile<Traits>& tile) {
    uint32_t finite = 0;
    auto packed = [&](int i) {
      const uint32_t pair = pack(o[2 * i] * inverse[i & 1], o[2 * i + 1] * inverse[i & 1], Element{});
      if constexpr (Traits::masked) finite = finite_sum<Element>(pair, finite);
      return pair;
    };
    if (Traits::stores_tma && !(Traits::ragged && first_row(tile) + 64 > tile.lengths.q_rows(args))) {
      if constexpr (Traits::stores_tma) store_tma(tile, packed);
    } else {
      store_rows(tile, packed);
    }
    if constexpr (Traits::masked) {
      if (finite & 0x7fff7fffu) atomicOr(&smem.bad_tiles[tile.number % kBits / 32], 1u << tile.number % 32);
    }
  }

  template <typename Packed>
  __device__ __forceinline__ void store_tma(const Tile<Traits>& tile, Packed packed) {
    if (leads()) tma_store_wait_read();  // the store before has read this buffer
    named_barrier_sync(8 + consumer, 128);
    const int tile_row = warp() * 16 + (lane & 15);
#pragma unroll
    for (int j = 0; j < Traits::head_dim / 16; ++j) {
      // stmatrix of 16 columns: rows 0-7 and 8-15 of columns 16 j ... + 7, then of + 8 ... + 15
      const int piece = (2 * j + lane / 16) & 7;  // of 16 bytes within the 128-byte row
      stmatrix_x4(&smem.o[consumer][j / 4][tile_row][(piece ^ (tile_row & 7)) * 8], packed(4 * j), packed(4 * j + 1),
                  packed(4 * j + 2), packed(4 * j + 3));
    }
    fence_async_proxy();
    named_barrier_sync(8 + consumer, 128);
    if (leads()) {
#pragma unroll
      for (int c = 0; c < Traits::chunks; ++c) {
        if (64 * c < args.head_dim) {
          tma_store_4d(o_map, smem.o[consumer][c], 64 * c, tile.lengths.q_start() + first_row(tile), tile.head,
                       tile.lengths.q_batch(args, tile.batch));
        }
      }
      tma_store_commit();
    }
  }

  /// 16 bytes a thread: four threads hold 32 columns of a row, 2 of every 8 each, and exchange them.
  template <typename Packed>
  __device__ __forceinline__ void store_rows(const Tile<Traits>& tile, Packed packed) {
    const int q_rows = tile.lengths.q_rows(args), row = row_of(tile), column = 8 * (lane & 3);
    Element* const to = static_cast<Element*>(args.out) + tile.lengths.q_batch(args, tile.batch) * args.out_stride[0] +
                        (tile.lengths.q_start() + row) * args.out_stride[1] + tile.head * args.out_stride[2] + column;
#pragma unroll
    for (int j = 0; j < Traits::head_dim / 32; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t x[4] = {packed(8 * j + r), packed(8 * j + 2 + r), packed(8 * j + 4 + r), packed(8 * j + 6 + r)};
        transpose_quad(x);
        if (row + 8 * r < q_rows && 32 * j + column < args.head_dim) {
          *reinterpret_cast<uint4*>(to + 8 * r * args.out_stride[1] + 32 * j) = uint4{x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

  /// x[i] of lane j of four becomes x[j] of lane i.
  __device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) const {
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + 1], 1);
      x[i] = odd ? other : x[i];
      x[i + 1] = odd ? x[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + 2], 2);
      x[i] = upper ? other : x[i];
      x[i + 2] = upper ? x[i + 2] : other;
    }
  }

  /// Hides keys of the latest tile's `block`, then takes in the maxima of its scores.
  template <bool kFirst>
  __device__ __forceinline__ bool take_scores(float (&s)[kScores], int block) {
    if (block >= range.whole_end || block < range.whole_begin) {
      mask_block<Traits>(s, args, tile(0), row_of(tile(0)), block * Traits::keys);
    }
    return softmax.template take_maxima<kFirst>(s, args.scale_log2, rescale);
  }

  /// One step of the sequence: the scores of the block at `kv` are computed, then (asynchronously) o += p V of the block
  /// before, at `v`; meanwhile those scores are made probabilities. kNewTile: they are the first of the latest tile, and o
  /// is the tile before's result. kEdge: a mask may be due; else the rows see the block whole.
  template <bool kNewTile, bool kEdge>
  __device__ __forceinline__ void step(const Stage& v, int block) {
    float s[kScores];
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    take_turn();
    wgmma_hold(s);
    wgmma_hold(o);
    wgmma_fence();
    issue_qk(s, q.stage, kv.stage);
    barrier_wait(&smem.v_full[v.stage], v.phase);
    wgmma_fence();
    issue_pv(v.stage);
    pass_turn();
    if constexpr (kNewTile) {
      finish_rows(tile(1));
      softmax = Softmax{};
    }
    wgmma_wait<1>();
    wgmma_hold(s);
    release(&smem.k_empty[kv.stage]);
    const bool grew = kEdge && take_scores<kNewTile>(s, block);
    wgmma_wait<0>();
    wgmma_hold(o);
    release(&smem.v_empty[v.stage]);
    if constexpr (kNewTile) {
      store(tile(1));
    } else if (grew) {
      rescale_output();
    }
    accumulate = !kNewTile;
    if constexpr (kEdge) {
      softmax.template exponentiate<Element>(s, args.scale_log2, p);
    } else if (softmax.template exponentiate_unseen<Element>(s, args.scale_log2, p, rescale)) {
      rescale_output();
    }
  }

  /// The first scores of a tile, with nothing to overlap with.
  __device__ __forceinline__ void first_step(int block) {
    float s[kScores];
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    take_turn();
    wgmma_hold(s);
    wgmma_fence();
    issue_qk(s, q.stage, kv.stage);
    pass_turn();
    wgmma_wait<0>();
    wgmma_hold(s);
    release(&smem.k_empty[kv.stage]);
    softmax = Softmax{};
    take_scores<true>(s, block);
    softmax.template exponentiate<Element>(s, args.scale_log2, p);
    accumulate = false;
  }

  /// The last product of a tile, with nothing to overlap with.
  __device__ __forceinline__ void last_step(const Stage& v, const Tile<Traits>& tile) {
    barrier_wait(&smem.v_full[v.stage], v.phase);
    wgmma_hold(o);
    wgmma_fence();
    issue_pv(v.stage);
    finish_rows(tile);
    wgmma_wait<0>();
    wgmma_hold(o);
    release(&smem.v_empty[v.stage]);
    store(tile);
  }

  /// Moves on in the ring; the stage of the block whose scores came last.
  __device__ __forceinline__ Stage next_stage() {
    const Stage v = kv;
    kv.advance();
    return v;
  }

  /// The blocks of the latest tile after its first.
  __device__ __forceinline__ void walk_blocks(int& block) {
    while (block > range.first) {
      if (block > range.whole_end || block <= range.whole_begin) {
        --block;
        step<false, true>(next_stage(), block);
      } else {
        const int last = max(range.whole_begin, range.first);
        do {
          --block;
          step<false, false>(next_stage(), block);
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
      first_step(block);
      while (true) {
        walk_blocks(block);
        const Stage v = next_stage();
        leave_q();
        if constexpr (Traits::q_stages == 1) {
          last_step(v, tile(0));  // while the next Q arrives
          more = begin_tile(block);
          break;
        }
        more = begin_tile(block);
        if (!more || range.idle) {
          last_step(v, tile(more ? 1 : 0));
          break;
        }
        step<true, true>(v, block);
      }
    }
  }
};

}  // namespace vivace::sm90
