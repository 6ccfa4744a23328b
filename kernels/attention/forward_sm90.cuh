// Attention forward for Hopper (sm_90a): FlashAttention (arXiv 2205.14135, 2307.08691) with warp specialisation and
// asynchronous matrix products as in FlashAttention-3 (arXiv 2407.08608).
//
// A block owns an SM and works through tiles of kRows queries of one head. One warp of the first warpgroup (the producer)
// loads Q, K and V by TMA into rings; the other warpgroups (consumers) hold 64 query rows each, with scores and output in
// registers:
//
//   S(n) = Q K(n)ᵀ is issued, then O += P(n+1) V(n+1); the softmax of S(n) runs while the tensor cores do the latter.
//   Named barriers pass the tensor cores from warpgroup to warpgroup, so that one computes softmax while another multiplies.
//
// Keys are walked from the last block to the first, so that masked blocks (sequence end, diagonal) come first.
//
//   head_dim | rows x keys | consumers | stages | shared memory        | registers of a consumer thread (S + P + O)
//   64       | 192 x 128   | 3         | 3      | 24 Q + 96 KV + 24 O  | 64 + 32 + 32 of 160
//   128      | 128 x 128   | 2         | 2      | 32 Q + 128 KV + 32 O | 64 + 32 + 64 of 240
//
// Two savings on the exponential, which at head_dim 64 needs as many cycles as the products: the output is rescaled only
// when the row maximum grew by more than 2^8 (bf16 and fp16 probabilities keep their relative precision up to there), and a
// part of the exponentials is computed on the FMA pipes (exp2_fma below) instead of the special function unit.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/attention/params.h"
#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma.cuh"

namespace vivace::sm90 {

template <typename Element, int kHeadDim, int kKeys, int kConsumers, int kStages, bool kMasked, int kFmaOf8,
          bool kTurns = true>
struct ForwardTraits {
  using element = Element;
  static constexpr int head_dim = kHeadDim;
  static constexpr int keys = kKeys;
  static constexpr int consumers = kConsumers;
  static constexpr int stages = kStages;
  static constexpr bool masked = kMasked;  // causal or window: the range of keys depends on the tile
  static constexpr int rows = 64 * kConsumers;
  static constexpr int threads = 128 * (kConsumers + 1);
  static constexpr int chunks = kHeadDim / 64;  // of 64 elements, the width of a swizzled row
  static constexpr int producer_registers = kConsumers == 3 ? 32 : 24;
  static constexpr int consumer_registers = kConsumers == 3 ? 160 : 240;
  // Of every 8 exponentials, how many run on the FMA pipes.
  static constexpr int fma_of_8 = kFmaOf8;
  static constexpr bool turns = kTurns;  // consumers take turns at the tensor cores
};

template <typename Traits>
struct alignas(1024) ForwardSmem {
  using Element = typename Traits::element;
  Element q[2][Traits::chunks][Traits::rows][64];  // this tile's and the next one's
  Element k[Traits::stages][Traits::chunks][Traits::keys][64];
  Element v[Traits::stages][Traits::chunks][Traits::keys][64];
  Element o[Traits::consumers][Traits::chunks][64][64];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[Traits::stages], k_empty[Traits::stages];
  uint64_t v_full[Traits::stages], v_empty[Traits::stages];
};

/// What the kernel needs besides the tensor maps.
struct ForwardArgs {
  float* lse;                             // (batch, heads, seqlen_q)
  int32_t batch, heads, heads_kv, group;  // group = heads / heads_kv
  int32_t seqlen_q, seqlen_k;
  int32_t row_blocks;                 // ceil(seqlen_q / rows)
  int32_t tiles;                      // row_blocks * batch * heads
  int32_t heads_in_l2;                // (batch, head) pairs whose K and V share L2: scheduled together
  int32_t window_left, window_right;  // -1: open
  float scale_log2;                   // softmax_scale * log2(e)
  float softmax_scale;
};

struct Tile {
  int row_block, head, batch;
  int first_block, last_block;  // blocks of keys [first, last)
};

/// Walks through the tiles of this block, in an order that needs no communication. Full attention: tiles of equal cost,
/// neighbours share K and V. Masked: groups of heads whose K and V fit L2, and in a group by row block, up and down in turns
/// and down in the last, so that the cost of a tile changes little from one to the next and ends small; every other round
/// runs backwards over the grid, so that a block that got the longest tile of a round gets the shortest of the next.
template <typename Traits>
struct TileWalk {
  int step = 0;

  /// False after the last tile.
  __device__ __forceinline__ bool next(const ForwardArgs& args, Tile& tile) {
    const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int index = step * grid + ((Traits::masked && (step & 1)) ? grid - 1 - block : block);
    ++step;
    if (index >= args.tiles) return false;  // only the last round is not full
    int pair;
    if constexpr (Traits::masked) {
      const int pairs = args.batch * args.heads;
      const int group_tiles = args.heads_in_l2 * args.row_blocks;
      const int group = index / group_tiles;
      const int rest = index - group * group_tiles;
      const int size = min(args.heads_in_l2, pairs - group * args.heads_in_l2);
      const int from_last = (pairs - 1) / args.heads_in_l2 - group;
      const int rank = rest / size;
      tile.row_block = (from_last & 1) ? rank : args.row_blocks - 1 - rank;
      pair = group * args.heads_in_l2 + rest - rank * size;
    } else {
      pair = index / args.row_blocks;
      tile.row_block = index - pair * args.row_blocks;
    }
    tile.batch = pair / args.heads;
    tile.head = pair - tile.batch * args.heads;

    tile.first_block = 0;
    tile.last_block = (args.seqlen_k + Traits::keys - 1) / Traits::keys;
    if constexpr (Traits::masked) {
      const int first_row = tile.row_block * Traits::rows;
      tile.last_block = last_block(args, min(first_row + Traits::rows, args.seqlen_q) - 1);
      if (args.window_left >= 0) {
        tile.first_block = max(first_row + args.seqlen_k - args.seqlen_q - args.window_left, 0) / Traits::keys;
      }
    }
    return true;
  }

  /// One past the last block of keys that `row` sees.
  static __device__ __forceinline__ int last_block(const ForwardArgs& args, int row) {
    int end = args.seqlen_k;
    if (args.window_right >= 0) end = min(end, max(row + args.seqlen_k - args.seqlen_q + args.window_right + 1, 0));
    return (end + Traits::keys - 1) / Traits::keys;
  }
};

/// 2^x on the FMA pipes, x <= 128: round(x) goes into the exponent, 2^(x - round(x)) is a polynomial of degree 3 (minimax on
/// [-0.5, 0.5], relative error 7.5e-5, where a bf16 probability has 2e-3 and an fp16 one 2.4e-4). NaN stays NaN, -inf gives
/// 2^-127.
__device__ __forceinline__ float exp2_fma(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  asm("max.NaN.f32 %0, %1, 0fC2FE0000;" : "=f"(x) : "f"(x));  // -127
  const float shifted = x + kRound;
  const float r = x - (shifted - kRound);
  float p = fmaf(r, 0.0551716685f, 0.2426111251f);
  p = fmaf(p, r, 0.6932609677f);
  p = fmaf(p, r, 0.9999280572f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

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

/// The online softmax of one thread's two rows (lane / 4 and lane / 4 + 8 of its warp's 16).
template <typename Traits>
struct Softmax {
  static constexpr int kScores = Traits::keys / 2;  // a thread's scores of one block
  float max[2] = {-INFINITY, -INFINITY};  // that the exponentials are relative to; true maximum - 8 / scale_log2 at least
  float sum[2] = {0.0f, 0.0f};            // of this thread's columns only

  /// Turns scores into probabilities; returns whether the output must be rescaled, and by what.
  template <bool kFirst, bool kMaskedBlock>
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
    if constexpr (kMaskedBlock || Traits::fma_of_8 == 0) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = exp2_sfu(fmaf(s[i], scale_log2, (i & 2) ? -m1 : -m0));
    } else {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float x = fmaf(s[i], scale_log2, (i & 2) ? -m1 : -m0);
        s[i] = (i & 7) < Traits::fma_of_8 ? exp2_fma(x) : exp2_sfu(x);
      }
    }
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

/// Hides keys that a row must not see. `column` is the first key of the block, `row` this thread's first query row.
template <typename Traits>
__device__ __forceinline__ void mask_block(float (&s)[Traits::keys / 2], const ForwardArgs& args, int row, int column) {
  const int lane = threadIdx.x & 31;
  const int offset = args.seqlen_k - args.seqlen_q;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int position = row + 8 * r + offset;
    // Visible keys of the row, relative to this thread's first column.
    int end = args.seqlen_k;
    int begin = 0;
    if constexpr (Traits::masked) {
      if (args.window_right >= 0) end = min(end, position + args.window_right + 1);
      if (args.window_left >= 0) begin = max(begin, position - args.window_left);
    }
    end -= column + 2 * (lane & 3);
    begin -= column + 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < Traits::keys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int k = 8 * j + c;
        if (k >= end || (Traits::masked && k < begin)) s[4 * j + 2 * r + c] = -INFINITY;
      }
    }
  }
}

/// A position in a ring of `kStages` buffers, and the parity of the barrier phase that it is in.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

/// Loads Q once a tile, and K and V block by block, last to first.
template <typename Traits>
__device__ void produce(ForwardSmem<Traits>& smem, const ForwardArgs& args, const CUtensorMap* q_map,
                        const CUtensorMap* k_map, const CUtensorMap* v_map) {
  using Element = typename Traits::element;
  constexpr uint32_t kBlockBytes = Traits::keys * Traits::head_dim * sizeof(Element);
  Tile tile;
  RingPosition<Traits::stages> kv;
  RingPosition<2> q;
  for (TileWalk<Traits> walk; walk.next(args, tile);) {
    const int head_kv = tile.head / args.group;
    auto load_block = [&](Element(*destination)[Traits::keys][64], const CUtensorMap* map, uint64_t* barrier, int block) {
      barrier_expect(barrier, kBlockBytes);
#pragma unroll
      for (int c = 0; c < Traits::chunks; ++c) {
        tma_load_4d(destination[c], map, barrier, 64 * c, block * Traits::keys, head_kv, tile.batch, kEvictLast);
      }
    };
    for (int block = tile.last_block - 1; block >= tile.first_block; --block) {
      if (block == tile.last_block - 1) {
        barrier_wait(&smem.q_empty[q.stage], q.phase ^ 1);
        barrier_expect(&smem.q_full[q.stage], Traits::rows * Traits::head_dim * sizeof(Element));
#pragma unroll
        for (int c = 0; c < Traits::chunks; ++c) {
          tma_load_4d(smem.q[q.stage][c], q_map, &smem.q_full[q.stage], 64 * c, tile.row_block * Traits::rows, tile.head,
                      tile.batch, kEvictFirst);
        }
        q.advance();
      }
      barrier_wait(&smem.k_empty[kv.stage], kv.phase ^ 1);
      load_block(smem.k[kv.stage], k_map, &smem.k_full[kv.stage], block);
      barrier_wait(&smem.v_empty[kv.stage], kv.phase ^ 1);
      load_block(smem.v[kv.stage], v_map, &smem.v_full[kv.stage], block);
      kv.advance();
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
  RingPosition<Traits::stages> kv;  // of the block whose scores come next
  RingPosition<2> q;                // of the tile whose scores come next
  float s[kScores];                 // scores, then probabilities
  float o[kOutputs];
  uint32_t p[Traits::keys / 16][4];  // probabilities as the A operand
  Softmax<Traits> softmax;           // of s
  float rescale[2];                  // of o, when a maximum grew
  bool accumulate = false;           // whether o holds products of this tile already

  __device__ __forceinline__ int warp() const { return (static_cast<int>(threadIdx.x) / 32) & 3; }
  __device__ __forceinline__ bool leads() const { return (threadIdx.x & 127) == 0; }
  __device__ __forceinline__ int first_row(const Tile& tile) const { return tile.row_block * Traits::rows + consumer * 64; }

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

  /// Blocks [begin, end) of this warpgroup's rows need no mask: all their keys are seen by all rows.
  __device__ __forceinline__ int unmasked_end(const Tile& tile) const {
    int end = args.seqlen_k;
    if constexpr (Traits::masked) {
      if (args.window_right >= 0) end = min(end, first_row(tile) + args.seqlen_k - args.seqlen_q + args.window_right + 1);
    }
    return end / Traits::keys;
  }
  __device__ __forceinline__ int unmasked_begin(const Tile& tile) const {
    if constexpr (Traits::masked) {
      if (args.window_left >= 0) {
        const int begin = max(first_row(tile) + 63 + args.seqlen_k - args.seqlen_q - args.window_left, 0);
        return (begin + Traits::keys - 1) / Traits::keys;
      }
    }
    return 0;
  }

  /// Moves to the next tile and the first block that this warpgroup's rows see; those before it lie past their diagonal.
  __device__ __forceinline__ bool next_tile(Tile& tile, int& block) {
    if (!walk.next(args, tile)) return false;
    block = tile.last_block - 1;
    if constexpr (Traits::masked) {
      const int own_last = min(tile.last_block, TileWalk<Traits>::last_block(args, first_row(tile) + 63));
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

  /// The sum over the four threads of a row, 1 / sum, and the tile through shared memory to TMA.
  __device__ __forceinline__ void store(const Tile& tile, const Softmax<Traits>& softmax) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax.sum[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = first_row(tile) + warp() * 16 + lane / 4 + 8 * r;
      if (lane % 4 == 0 && row < args.seqlen_q) {
        const float lse = sum == 0.0f ? -INFINITY : softmax.max[r] * args.softmax_scale + logf(sum);
        args.lse[(static_cast<int64_t>(tile.batch) * args.heads + tile.head) * args.seqlen_q + row] = lse;
      }
    }
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
        tma_store_4d(o_map, smem.o[consumer][c], 64 * c, first_row(tile), tile.head, tile.batch);
      }
      tma_store_commit();
    }
  }

  /// Hides keys, then turns the scores of (tile, block) into probabilities.
  template <bool kFirst, bool kMask>
  __device__ __forceinline__ bool soften(const Tile& tile, int block) {
    if constexpr (kMask) {
      // At a tile's first block whether it needs a mask is known at run time only.
      if (block >= unmasked_end(tile) || block < unmasked_begin(tile)) {
        mask_block<Traits>(s, args, first_row(tile) + warp() * 16 + lane / 4, block * Traits::keys);
      }
    }
    return softmax.template step<kFirst, kMask>(s, args.scale_log2, rescale);
  }

  /// One step of the sequence: the scores of the block at `kv` are computed, then (asynchronously) o += p V of the block
  /// before, at `v`; meanwhile those scores are made probabilities. kNewTile: they are the first of `tile`, and o is
  /// `done`'s result.
  template <bool kNewTile, bool kMask>
  __device__ __forceinline__ void step(const RingPosition<Traits::stages>& v, const Tile& tile, int block,
                                       const Tile& done) {
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
    Tile tile;
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
      const int end = unmasked_end(tile), begin = max(unmasked_begin(tile), tile.first_block);
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
      const Tile done = tile;
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
    for (int i = 0; i < 2; ++i) {
      barrier_init(&smem.q_full[i], 1);
      barrier_init(&smem.q_empty[i], 4 * Traits::consumers);
    }
    for (int i = 0; i < Traits::stages; ++i) {
      barrier_init(&smem.k_full[i], 1);
      barrier_init(&smem.v_full[i], 1);
      barrier_init(&smem.k_empty[i], 4 * Traits::consumers);
      barrier_init(&smem.v_empty[i], 4 * Traits::consumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<Traits::producer_registers>();
    if (threadIdx.x == 0) produce<Traits>(smem, args, &q_map, &k_map, &v_map);
  } else {
    registers_increase<Traits::consumer_registers>();
    Consumer<Traits> consumer{smem, args, &o_map};
    consumer.run();
  }
#endif
}

}  // namespace vivace::sm90
