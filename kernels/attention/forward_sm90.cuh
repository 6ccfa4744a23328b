// Attention forward for Hopper (sm_90a): FlashAttention (arXiv 2205.14135, 2307.08691) with warp specialisation and
// asynchronous matrix products as in FlashAttention-3 (arXiv 2407.08608). docs/kernels.md has a picture.
//
// A block owns an SM and works through tiles of 64 queries a consumer of one head. Of the first warpgroup, one warp loads Q,
// K and V by TMA into rings, and three inspect V where some row does not see all of a block (forward_sm90_load.cuh); the
// other warpgroups (consumers) hold 64 query rows each, with scores and output in registers:
//
//   S(n) = Q K(n)ᵀ is issued, then O += P(n+1) V(n+1); the softmax of S(n) runs while the tensor cores do the latter.
//   Named barriers pass the tensor cores from warpgroup to warpgroup, so that one computes softmax while another multiplies.
//
// Keys are walked from the last block to the first, so that masked blocks (sequence end, diagonal) come first.
//
//   head_dim | rows x keys | consumers | KV stages | shared memory, KiB       | S + P + O of a consumer thread's registers
//   <= 64    | 192 x 128   | 3         | 3         | 48 Q + 96 KV + 24 O = 168 | 64 + 32 + 32  = 128 of 160
//   ... short  128 x 128   | 2         | 4         | 32 Q + 128 KV + 16 O = 176 | 64 + 32 + 32  = 128 of 240
//   <= 96    | 128 x 128   | 2         | 2         | 64 Q + 128 KV + 32 O = 224 | 64 + 32 + 48  = 144 of 240
//   <= 128   | 128 x 128   | 2         | 2         | 64 Q + 128 KV + 32 O = 224 | 64 + 32 + 64  = 160 of 240
//   <= 192   | 128 x 112   | 2         | 2         | 48 Q + 168 KV       = 216 | 56 + 28 + 96  = 180 of 240
//   <= 256   | 128 x 80    | 2         | 2         | 64 Q + 160 KV       = 224 | 40 + 20 + 128 = 188 of 240
//
// Short: ragged, or masked up to 1024 queries. Ragged consumers have 232 registers, the inspecting warps need some more. Q
// has two buffers where there is room, so that the next tile's is there when its first scores are due. The output is
// rescaled only when the row maximum grew by more than 2^8: bf16 and fp16 probabilities keep their relative precision up to
// there.
#pragma once

#include <type_traits>

#include "kernels/attention/forward_sm90_load.cuh"
#include "kernels/attention/forward_sm90_tile.cuh"
#include "kernels/common/wgmma.cuh"

namespace vivace::sm90 {

/// ex2.approx
__device__ __forceinline__ float exp2_sfu(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float lo, float hi, __nv_bfloat16) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ uint32_t pack(float lo, float hi, __half) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

/// The online softmax of one thread's two rows (lane / 4 and lane / 4 + 8 of its warp's 16). Unlike OnlineSoftmax of
/// softmax.cuh it may leave the output as it is, and the output is not at hand when the scores are.
template <typename Traits>
struct Softmax {
  static constexpr int kScores = Traits::keys / 2;  // a thread's scores of one block
  float max[2] = {-INFINITY, -INFINITY};  // that the exponentials are relative to; true maximum - 8 / scale_log2 at least
  float sum[2] = {0.0f, 0.0f};            // of this thread's columns only

  /// Turns scores into probabilities; returns whether the output must be rescaled, and by what.
  template <bool kFirst>
  __device__ __forceinline__ bool step(float (&s)[kScores], float scale_log2, float (&rescale)[2]) {
    float block_max[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      block_max[0] = fmaxf(block_max[0], fmaxf(s[i], s[i + 1]));
      block_max[1] = fmaxf(block_max[1], fmaxf(s[i + 2], s[i + 3]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      block_max[r] = fmaxf(block_max[r], __shfl_xor_sync(0xffffffffu, block_max[r], 1));
      block_max[r] = fmaxf(block_max[r], __shfl_xor_sync(0xffffffffu, block_max[r], 2));
    }
    bool grew = false;
    if constexpr (kFirst) {
      max[0] = block_max[0];
      max[1] = block_max[1];
      rescale[0] = rescale[1] = 1.0f;
    } else {
      // 2^8 of growth is let through: probabilities up to 256 are as precise, and the sum is in fp32.
      grew = (block_max[0] - max[0]) * scale_log2 > 8.0f || (block_max[1] - max[1]) * scale_log2 > 8.0f;
      grew = __any_sync(0xffffffffu, grew);
      if (grew) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float before = max[r];
          max[r] = fmaxf(before, block_max[r]);
          rescale[r] = max[r] == -INFINITY ? 1.0f : exp2_sfu((before - max[r]) * scale_log2);
          sum[r] *= rescale[r];
        }
      }
    }
    const float m0 = max[0] == -INFINITY ? 0.0f : max[0] * scale_log2;
    const float m1 = max[1] == -INFINITY ? 0.0f : max[1] * scale_log2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = exp2_sfu(fmaf(s[i], scale_log2, (i & 2) ? -m1 : -m0));
    float partial[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      partial[0] += s[i] + s[i + 1];
      partial[1] += s[i + 2] + s[i + 3];
    }
    sum[0] += partial[0];
    sum[1] += partial[1];
    return grew;
  }
};

/// Hides keys that a row must not see. `column` is the first key of the block, `row` this thread's first query row. A thread
/// has 2 columns of every 8, at most 32 a row: what a row sees is one word, whatever the mask.
template <typename Traits>
__device__ __forceinline__ void mask_block(float (&s)[Traits::keys / 2], const ForwardArgs& args, const Tile<Traits>& tile,
                                           int row, int column) {
  static_assert(Traits::keys <= 128);
  column += 2 * (static_cast<int>(threadIdx.x) & 3);
  // Bits of this thread's columns before key `end`.
  auto columns_before = [&](int end) {
    end = min(max(end - column, 0), Traits::keys);
    return static_cast<uint32_t>((uint64_t{1} << (end / 8 * 2 + min(end % 8, 2))) - 1);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int begin, end;
    tile.visible(args, row + 8 * r, begin, end);
    const uint32_t seen = columns_before(end) & ~columns_before(begin);
#pragma unroll
    for (int j = 0; j < Traits::keys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if ((seen & (1u << (2 * j + c))) == 0) s[4 * j + 2 * r + c] = -INFINITY;
      }
    }
  }
}

/// One consumer warpgroup: 64 query rows of each tile. The blocks of all its tiles are one sequence: the first scores of a
/// tile are computed while the last product of the tile before runs.
template <typename Traits>
struct Consumer {
  using Element = typename Traits::element;
  using QK = Wgmma<Element, Traits::keys>;
  using PV = Wgmma<Element, Traits::head_dim>;
  static constexpr int kScores = Traits::keys / 2, kOutputs = Traits::head_dim / 2;
  static constexpr uint32_t kKeyChunkBytes = Traits::keys * 128;
  static constexpr int kTurnThreads = 128 * Traits::consumers;

  ForwardSmem<Traits>& smem;
  const ForwardArgs& args;
  const CUtensorMap* o_map;
  // From lane 0: tells the compiler that a warp never diverges over it.
  const int consumer = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  const int lane = static_cast<int>(threadIdx.x) & 31;
  TileWalk<Traits> walk;
  RingPosition<Traits::stages> kv;   // of the block whose scores come next
  RingPosition<Traits::q_stages> q;  // of the tile whose scores come next
  float s[kScores];                  // scores, then probabilities
  float o[kOutputs];
  uint32_t p[Traits::keys / 16][4];  // probabilities as the A operand
  Softmax<Traits> softmax;           // of s
  float rescale[2];                  // of o, when a maximum grew
  bool accumulate = false;           // whether o holds products of this tile already
  int stored = 0;                    // tiles

  __device__ __forceinline__ int warp() const { return (static_cast<int>(threadIdx.x) / 32) & 3; }
  __device__ __forceinline__ bool leads() const { return (threadIdx.x & 127) == 0; }
  __device__ __forceinline__ int first_row(const Tile<Traits>& tile) const { return tile.first_row() + consumer * 64; }

  // Barrier 1 + i lets consumer i issue its products; all consumers take part in each.
  __device__ __forceinline__ void take_turn() const {
    if constexpr (Traits::turns) named_barrier_sync(1 + consumer, kTurnThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (Traits::turns) {
#pragma unroll
      for (int i = 1; i < Traits::consumers; ++i) named_barrier_arrive(1 + (consumer + i) % Traits::consumers, kTurnThreads);
    }
  }

  __device__ __forceinline__ void issue_qk() {
    const uint32_t q_address = smem_address(smem.q[q.stage]) + consumer * 64 * 128;
    const uint32_t k_address = smem_address(smem.k[kv.stage]);
#pragma unroll
    for (int i = 0; i < Traits::head_dim / 16; ++i) {
      const uint32_t within = (i % 4) * 32;
      QK::ss(s, wgmma_descriptor(q_address + (i / 4) * Traits::rows * 128 + within, 16),
             wgmma_descriptor(k_address + (i / 4) * kKeyChunkBytes + within, 16), i != 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_pv(int stage, bool accumulate) {
    const uint32_t v_address = smem_address(smem.v[stage]);
#pragma unroll
    for (int i = 0; i < Traits::keys / 16; ++i) {
      PV::rs(o, p[i], wgmma_descriptor(v_address + i * 16 * 128, kKeyChunkBytes), accumulate || i != 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void to_probabilities() {
#pragma unroll
    for (int i = 0; i < Traits::keys / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) p[i][j] = pack(s[8 * i + 2 * j], s[8 * i + 2 * j + 1], Element{});
    }
  }

  /// Moves to the next tile and the first block that this warpgroup's rows see; those before it lie past their diagonal.
  __device__ __forceinline__ bool next_tile(Tile<Traits>& tile, int& block) {
    if (!walk.next(args, tile)) return false;
    block = tile.last_block - 1;
    if constexpr (Traits::masked) {
      // Rows that see nothing take part in one block.
      const int own_last = max(min(tile.last_block, tile.last_block_of(args, first_row(tile) + 63)), tile.first_block + 1);
      for (; block >= own_last; --block) pass_over();
    }
    return true;
  }

  /// Leaves a block to the other warpgroups. The products of the block before may still be pending: its stage is not waited
  /// for.
  __device__ __forceinline__ void pass_over() {
    static_assert((Traits::rows - 64 + Traits::keys - 1) / Traits::keys < Traits::stages);
    take_turn();
    pass_turn();
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    if (lane == 0) barrier_arrive(&smem.k_empty[kv.stage]);
    barrier_wait(&smem.v_full[kv.stage], kv.phase);
    if (lane == 0) barrier_arrive(&smem.v_empty[kv.stage]);
    kv.advance();
  }

  /// Adds to o the elements that were taken out of V, for the rows that see them. Rare: read from global memory.
  __device__ __forceinline__ void add_removed(const Tile<Traits>& tile) {
    const Element* v = static_cast<const Element*>(args.v) + tile.lengths.k_batch(args, tile.batch) * args.v_stride[0] +
                       tile.lengths.k_start() * args.v_stride[1] + tile.head / args.group * args.v_stride[2];
    int begin[2], end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) tile.visible(args, first_row(tile) + warp() * 16 + lane / 4 + 8 * r, begin[r], end[r]);
#pragma unroll 1
    for (int key = tile.first_block * Traits::keys; key < tile.lengths.key_end(args); ++key) {
      if (!tile.inspected(args, key / Traits::keys)) continue;
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

  /// The sum over the four threads of a row, 1 / sum, and the tile through shared memory to TMA; where there is no buffer
  /// for that, or the 64 rows reach into the next sequence, from registers to global memory.
  __device__ __forceinline__ void store(const Tile<Traits>& tile, const Softmax<Traits>& softmax) {
    if constexpr (Traits::masked) {
      if (tile.any_inspected(args) && smem.removed[stored % kRemovedRing] != 0) add_removed(tile);
      ++stored;
    }
    const int q_rows = tile.lengths.q_rows(args);
    const int q_batch = tile.lengths.q_batch(args, tile.batch), q_start = tile.lengths.q_start();
    const int row = first_row(tile) + warp() * 16 + lane / 4;  // and row + 8
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane % 4 == 0 && row + 8 * r < q_rows) {
        const float lse = sum == 0.0f ? -INFINITY : softmax.max[r] * args.softmax_scale + logf(sum);
        args.lse[q_batch * args.lse_batch_stride + tile.head * args.lse_head_stride + q_start + row + 8 * r] = lse;
      }
    }
    if (!Traits::stores_tma || (Traits::ragged && first_row(tile) + 64 > q_rows)) {
      Element* out = static_cast<Element*>(args.out) + q_batch * args.out_stride[0] + (q_start + row) * args.out_stride[1] +
                     tile.head * args.out_stride[2] + 2 * (lane & 3);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= q_rows) continue;
#pragma unroll
        for (int j = 0; j < Traits::head_dim / 8; ++j) {
          if (8 * j < args.head_dim) {
            *reinterpret_cast<uint32_t*>(out + 8 * r * args.out_stride[1] + 8 * j) =
                pack(o[4 * j + 2 * r] * inverse[r], o[4 * j + 2 * r + 1] * inverse[r], Element{});
          }
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
        const float* f = &o[8 * j];
        const int piece = (2 * j + lane / 16) & 7;  // of 16 bytes within the 128-byte row
        Element* at = &smem.o[consumer][j / 4][tile_row][(piece ^ (tile_row & 7)) * 8];
        stmatrix_x4(
            at, pack(f[0] * inverse[0], f[1] * inverse[0], Element{}), pack(f[2] * inverse[1], f[3] * inverse[1], Element{}),
            pack(f[4] * inverse[0], f[5] * inverse[0], Element{}), pack(f[6] * inverse[1], f[7] * inverse[1], Element{}));
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

  /// Hides keys, then turns the scores of (tile, block) into probabilities.
  template <bool kFirst, bool kMask>
  __device__ __forceinline__ bool soften(const Tile<Traits>& tile, int block) {
    if constexpr (kMask) {
      // At a tile's first block whether it needs a mask is known at run time only.
      if (block >= tile.whole_end(args, first_row(tile), 64) || block < tile.whole_begin(args, first_row(tile), 64)) {
        mask_block<Traits>(s, args, tile, first_row(tile) + warp() * 16 + lane / 4, block * Traits::keys);
      }
    }
    return softmax.template step<kFirst>(s, args.scale_log2, rescale);
  }

  /// One step of the sequence: the scores of the block at `kv` are computed, then (asynchronously) o += p V of the block
  /// before, at `v`; meanwhile those scores are made probabilities. kNewTile: they are the first of `tile`, and o is
  /// `done`'s result.
  template <bool kNewTile, bool kMask>
  __device__ __forceinline__ void step(const RingPosition<Traits::stages>& v, const Tile<Traits>& tile, int block,
                                       const Tile<Traits>& done) {
    if constexpr (kNewTile) barrier_wait(&smem.q_full[q.stage], q.phase);
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    take_turn();
    wgmma_hold(s);
    wgmma_hold(o);
    wgmma_fence();
    issue_qk();
    barrier_wait(&smem.v_full[v.stage], v.phase);
    issue_pv(v.stage, accumulate);
    pass_turn();
    wgmma_wait<1>();
    wgmma_hold(s);
    if (lane == 0) barrier_arrive(&smem.k_empty[kv.stage]);
    if constexpr (kNewTile) {
      const Softmax<Traits> old = softmax;
      softmax = Softmax<Traits>{};
      soften<true, kMask>(tile, block);
      wgmma_wait<0>();
      wgmma_hold(o);
      if (lane == 0) barrier_arrive(&smem.v_empty[v.stage]);
      store(done, old);
      accumulate = false;
    } else {
      const bool grew = soften<false, kMask>(tile, block);
      wgmma_wait<0>();
      wgmma_hold(o);
      if (lane == 0) barrier_arrive(&smem.v_empty[v.stage]);
      if (grew) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[(i >> 1) & 1];
      }
      accumulate = true;
    }
    to_probabilities();
  }

  __device__ __forceinline__ void run() {
    if constexpr (Traits::turns) {
      // The first turn of consumer i needs the arrival of those after it.
#pragma unroll
      for (int i = 0; i < Traits::consumers - 1; ++i) {
        if (consumer > i) named_barrier_arrive(1 + i, kTurnThreads);
      }
    }
    Tile<Traits> tile;
    int block;
    if (!next_tile(tile, block)) return;

    // The very first scores: nothing to overlap with.
    barrier_wait(&smem.q_full[q.stage], q.phase);
    barrier_wait(&smem.k_full[kv.stage], kv.phase);
    wgmma_hold(s);
    wgmma_fence();
    issue_qk();
    wgmma_wait<0>();
    wgmma_hold(s);
    if (lane == 0) barrier_arrive(&smem.k_empty[kv.stage]);
    soften<true, true>(tile, block);
    to_probabilities();
    accumulate = false;

    while (true) {
      // Right edge, bulk, left edge.
      const int end = tile.whole_end(args, first_row(tile), 64);
      const int begin = max(tile.whole_begin(args, first_row(tile), 64), tile.first_block);
      auto walk_blocks = [&](auto mask, int until) {
        while (block > until) {
          --block;
          const RingPosition<Traits::stages> v = kv;
          kv.advance();
          step<false, decltype(mask)::value>(v, tile, block, tile);
        }
      };
      walk_blocks(std::true_type{}, max(end, tile.first_block));
      walk_blocks(std::false_type{}, begin);
      if constexpr (Traits::masked) walk_blocks(std::true_type{}, tile.first_block);

      const RingPosition<Traits::stages> v = kv;
      const Tile<Traits> done = tile;
      kv.advance();
      if (lane == 0) barrier_arrive(&smem.q_empty[q.stage]);
      q.advance();
      if (next_tile(tile, block)) {
        step<true, true>(v, tile, block, done);
      } else {
        barrier_wait(&smem.v_full[v.stage], v.phase);
        wgmma_hold(o);
        wgmma_fence();
        issue_pv(v.stage, accumulate);
        wgmma_wait<0>();
        wgmma_hold(o);
        store(done, softmax);
        break;
      }
    }
    if (leads()) tma_store_wait_read();  // shared memory must live until the last store has read it
  }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    forward_sm90_kernel(const __grid_constant__ ForwardArgs args, const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                        const __grid_constant__ CUtensorMap o_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  auto& smem = *reinterpret_cast<ForwardSmem<Traits>*>(raw_smem);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map);
    tma_prefetch_map(&k_map);
    tma_prefetch_map(&v_map);
    for (int i = 0; i < Traits::q_stages; ++i) {
      barrier_init(&smem.q_full[i], 1);
      barrier_init(&smem.q_empty[i], 4 * Traits::consumers);
    }
    for (int i = 0; i < Traits::stages; ++i) {
      barrier_init(&smem.k_full[i], 1);
      barrier_init(&smem.v_full[i], 1);
      barrier_init(&smem.k_empty[i], 4 * Traits::consumers);
      barrier_init(&smem.v_empty[i], 4 * Traits::consumers);
      barrier_init(&smem.v_raw[i], 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<Traits::producer_registers>();
    // From lane 0: tells the compiler that a warp never diverges over it.
    if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0) {
      produce<Traits>(smem, args, &q_map, &k_map, &v_map);
    } else if constexpr (Traits::masked) {
      inspect<Traits>(smem, args);
    }
  } else {
    registers_increase<Traits::consumer_registers>();
    Consumer<Traits> consumer{smem, args, &o_map};
    consumer.run();
  }
#endif
}

}  // namespace vivace::sm90
