// Attention forward on mma.sync tensor cores (sm_80 and newer): FlashAttention-2 (Dao, arXiv 2307.08691).
//
// A block takes kM queries of one head and walks over its keys in tiles of kN, S = Q K^T, online softmax, O += P V, with S,
// P and O in registers. Each warp owns kM / kWarps query rows, so that softmax needs no other warp. K and V tiles arrive by
// cp.async: with one buffer each, V(n) is under way during Q K(n) and K(n + 1) during P V(n); with two, K(n + 1) and
// V(n + 1) during the whole of block n.
//
//   head_dim |  kM x  kN  warps stages  shared  | why
//         64 | 128 x  64    4     2     48 KiB  | 32 rows a warp: one ldmatrix of K or V feeds twice the mma; Q in registers
//         96 | 128 x  64    4     1     48 KiB  | two blocks fit the 100 KiB of sm_86, 89 and 120
//        128 | 128 x  64    4     1     64 KiB  | S 64 + O 128 registers: Q is read again for each tile; two blocks an SM
//            | 128 x  32    4     1     48 KiB  | on sm_86, 89 and 120, for two blocks an SM
//        192 | 128 x  64    8     1     96 KiB  | 16 rows a warp, so that O (96 registers) fits; one block of 8 warps an SM
//        256 | 128 x  32    8     1     96 KiB  | O takes 128 registers; 99 KiB are all there is on sm_86, 89 and 120
//
// head_dim and head_dim_v up to the tile's are zero-filled. Two variants: plain (masks, lengths and caches; scale > 0,
// 16-byte aligned rows) and rich (also softcap, alibi, bias, sinks, dropout, any alignment), so that the common call does
// not pay.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/epilogue.cuh"
#include "kernels/attention/hidden_values.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/attention/swizzle.cuh"
#include "kernels/attention/tile_scheduler.cuh"
#include "kernels/common/ptx.cuh"

namespace vivace::sm80 {

/// What a launch passes.
struct ForwardArgs {
  AttentionParams params;
  Window window;
  TileOrder order;
  FastDivmod page_size;
  bool aligned;  // every row of q, k, v and out starts at a multiple of 16 bytes and is as long
};

template <int kM_, int kN_, int kWarps_, int kStages_, bool kHoldQ_, int kBlocksPerSm_>
struct TileConfig {
  static constexpr int kM = kM_, kN = kN_, kWarps = kWarps_, kStages = kStages_;
  static constexpr bool kHoldQ = kHoldQ_;  // in registers, for the whole walk
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kM / kWarps;  // of a warp
  static constexpr int kFragsM = kRows / 16;
};

/// small: an SM with 100 KiB of shared memory (sm_86, 87, 89, 120), not 164 or more.
template <int kHeadDim, bool kSmall>
struct ForwardTile;
template <bool kSmall>
struct ForwardTile<64, kSmall> : TileConfig<128, 64, 4, 2, true, 2> {};
template <bool kSmall>
struct ForwardTile<96, kSmall> : TileConfig<128, 64, 4, 1, false, 2> {};
template <bool kSmall>
struct ForwardTile<128, kSmall> : TileConfig<128, kSmall ? 32 : 64, 4, 1, false, 2> {};
template <bool kSmall>
struct ForwardTile<192, kSmall> : TileConfig<128, 64, 8, 1, false, 1> {};
template <bool kSmall>
struct ForwardTile<256, kSmall> : TileConfig<128, 32, 8, 1, false, 1> {};

template <int kHeadDim, bool kSmall>
inline constexpr int kSharedBytes = 2 * kHeadDim*(ForwardTile<kHeadDim, kSmall>::kM +
                                                  2 * ForwardTile<kHeadDim, kSmall>::kStages *
                                                      ForwardTile<kHeadDim, kSmall>::kN);

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
inline constexpr bool kSmallSm = true;
#else
inline constexpr bool kSmallSm = false;
#endif

/// s = Q K^T for a warp's rows. q, k: this lane's ldmatrix addresses; held: Q's fragments where the tile holds them.
template <typename T, int kDim, int kFragsM, int kFragsN, bool kHoldQ, int kHeld>
__device__ __forceinline__ void multiply_qk(float (&s)[kFragsM][kFragsN][4], const uint32_t (&held)[kFragsM][kHeld][4],
                                            uint32_t q, uint32_t k) {
  using Layout = Swizzle<kDim>;
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int f = 0; f < kFragsN; ++f) s[m][f][0] = s[m][f][1] = s[m][f][2] = s[m][f][3] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t q_frag[kFragsM][4];  // 16 rows x 16 dims each
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      if constexpr (kHoldQ) {
#pragma unroll
        for (int i = 0; i < 4; ++i) q_frag[m][i] = held[m][d][i];
      } else {
        ptx::ldmatrix_x4(q_frag[m], Layout::advance(q, 2 * d) + 16 * m * Layout::kRowBytes);
      }
    }
#pragma unroll
    for (int f = 0; f < kFragsN; f += 2) {
      uint32_t k_frag[4];  // keys 0-7: dims 0-7, 8-15; keys 8-15: the same
      ptx::ldmatrix_x4(k_frag, Layout::advance(k, 2 * d) + 8 * f * Layout::kRowBytes);
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
        ptx::mma_m16n8k16<T>(s[m][f], q_frag[m], k_frag[0], k_frag[1]);
        ptx::mma_m16n8k16<T>(s[m][f + 1], q_frag[m], k_frag[2], k_frag[3]);
      }
    }
  }
}

/// o += P V for a warp's rows: p, rounded to T, is an operand as it lies in registers (an accumulator's layout is an A
/// fragment's). v: this lane's ldmatrix address.
template <typename T, int kDim, int kFragsM, int kFragsN>
__device__ __forceinline__ void multiply_pv(float (&o)[kFragsM][kDim / 8][4], const float (&p)[kFragsM][kFragsN][4],
                                            uint32_t v) {
  using Layout = Swizzle<kDim>;
#pragma unroll
  for (int f = 0; f < kFragsN; f += 2) {
    uint32_t p_frag[kFragsM][4];  // 16 rows x 16 keys each
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      p_frag[m][0] = pack2<T>(p[m][f][0], p[m][f][1]);
      p_frag[m][1] = pack2<T>(p[m][f][2], p[m][f][3]);
      p_frag[m][2] = pack2<T>(p[m][f + 1][0], p[m][f + 1][1]);
      p_frag[m][3] = pack2<T>(p[m][f + 1][2], p[m][f + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      uint32_t v_frag[4];  // dims 0-7: keys 0-7, 8-15; dims 8-15: the same
      ptx::ldmatrix_x4_trans(v_frag, Layout::advance(v, d) + 8 * f * Layout::kRowBytes);
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
        ptx::mma_m16n8k16<T>(o[m][d], p_frag[m], v_frag[0], v_frag[1]);
        ptx::mma_m16n8k16<T>(o[m][d + 1], p_frag[m], v_frag[2], v_frag[3]);
      }
    }
  }
}

template <typename T, int kDim, bool kRich>
__global__ void __launch_bounds__(ForwardTile<kDim, kSmallSm>::kThreads, ForwardTile<kDim, kSmallSm>::kBlocksPerSm)
    attention_forward_kernel(const __grid_constant__ ForwardArgs args) {
  using Config = ForwardTile<kDim, kSmallSm>;
  using Layout = Swizzle<kDim>;
  constexpr int kM = Config::kM, kN = Config::kN, kStages = Config::kStages, kThreads = Config::kThreads;
  constexpr int kFragsM = Config::kFragsM, kFragsN = kN / 8, kFragsO = kDim / 8;
  constexpr int kTileBytes = kN * Layout::kRowBytes;

  const AttentionParams& p = args.params;
  const Tile tile = args.order(blockIdx.x);
  const Sequence seq(p, tile.batch);
  const int row0 = tile.m_block * kM;
  if (row0 >= seq.q_rows) return;
  const KeyBlocks<kN> blocks(seq, args.window, row0, kM);

  const int64_t head = tile.head, head_kv = tile.head / (p.heads / p.heads_kv);
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const RowSource<T> q_rows{static_cast<const T*>(p.q) + seq.q_offset + head * p.q_stride[2], p.q_stride[1]};
  const RowSource<T> k_rows{static_cast<const T*>(p.k) + seq.k_offset + head_kv * p.k_stride[2], p.k_stride[1], seq.pages,
                            p.k_stride[0], args.page_size};
  const RowSource<T> v_rows{static_cast<const T*>(p.v) + seq.v_offset + head_kv * p.v_stride[2], p.v_stride[1], seq.pages,
                            p.v_stride[0], args.page_size};

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared);      // (kM, kDim)
  const uint32_t k_tile = q_tile + kM * Layout::kRowBytes;  // (kStages, kN, kDim)
  const uint32_t v_tile = k_tile + kStages * kTileBytes;    // (kStages, kN, kDim)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp * Config::kRows;
  // Where this lane points ldmatrix: Q as A operand, K as B operand, V as B operand by .trans.
  const uint32_t q_lane = q_tile + Layout::offset(warp_row + lane % 16, lane / 16);
  const uint32_t k_lane = k_tile + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_lane = v_tile + Layout::offset(lane % 16, lane / 16);

  const auto load = [&]<int kRows>(uint32_t to, const RowSource<T>& from, int first, int begin, int end, int dim) {
    if (!kRich || args.aligned) {
      load_tile_async<kRows, kDim, kThreads>(to, from, first, begin, end, dim);
    } else {
      load_tile_elements<kRows, kDim, kThreads>(to, from, first, begin, end, dim);
    }
  };
  // Keys outside the sequence become zeros: 0 * NaN would leak from V. Past the last block: an empty group.
  const auto load_k = [&](int n) {
    if (n < blocks.end) {
      load.template operator()<kN>(k_tile + n % kStages * kTileBytes, k_rows, n * kN, seq.key_begin, seq.key_end, head_dim);
    }
    ptx::cp_async_commit();
  };
  const auto load_v = [&](int n) {
    if (n < blocks.end) {
      load.template operator()<kN>(v_tile + n % kStages * kTileBytes, v_rows, n * kN, seq.key_begin, seq.key_end,
                                   head_dim_v);
    }
    ptx::cp_async_commit();
  };

  // Rows of this thread: row + 16 * m + {0, 8}.
  const int row = row0 + warp_row + lane / 4;
  const ScoreTerms terms(p, tile.batch, tile.head);  // rich only, like dropout
  const Dropout dropout(p, tile.batch, tile.head);
  const bool has_terms = kRich && !terms.only_scale();
  const float scale_log2 = has_terms ? kLog2E : p.softmax_scale * kLog2E;
  OnlineSoftmax softmax[kFragsM];
  float o[kFragsM][kFragsO][4] = {};  // O: rows as above, columns 8 * f + 2 * (lane % 4) + {0, 1}; unnormalised

  if (!blocks.empty()) {
    load.template operator()<kM>(q_tile, q_rows, row0, 0, seq.queries, head_dim);
    ptx::cp_async_commit();
    load_k(blocks.begin);
    if constexpr (kStages == 2) load_v(blocks.begin);
  }
  constexpr int kHeld = Config::kHoldQ ? kDim / 16 : 1;
  uint32_t held[kFragsM][kHeld][4];
  if constexpr (Config::kHoldQ) {
    ptx::cp_async_wait<kStages>();  // all but the groups of K and V: Q is here
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int d = 0; d < kHeld; ++d) {
        ptx::ldmatrix_x4(held[m][d], Layout::advance(q_lane, 2 * d) + 16 * m * Layout::kRowBytes);
      }
    }
  }

#pragma unroll 1
  for (int n = blocks.begin; n < blocks.end; ++n) {
    if constexpr (kStages == 2) {
      ptx::cp_async_wait<0>();  // K(n) and V(n) are here, and the stage of n - 1 has been used by every warp
      __syncthreads();
      load_k(n + 1);
      load_v(n + 1);
    } else {
      ptx::cp_async_wait<0>();  // K(n) is here, and V(n - 1) has been used by every warp
      __syncthreads();
      load_v(n);
    }

    float s[kFragsM][kFragsN][4];  // S, then P: rows as o, keys n * kN + 8 * f + 2 * (lane % 4) + {0, 1}
    multiply_qk<T, kDim, kFragsM, kFragsN, Config::kHoldQ>(s, held, q_lane, k_lane + n % kStages * kTileBytes);

    const bool masked = blocks.masked(n);
    const int column0 = n * kN + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      if (masked || has_terms) {
        const int i = ptx::opaque(row + 16 * m);  // or every row's interval takes registers through the loop
        const VisibleKeys upper(seq, args.window, i), lower(seq, args.window, i + 8);
        if (has_terms) terms.apply<T>(s[m], upper, lower, i, seq.keys - seq.queries, column0);
        if (masked) mask_scores(s[m], upper, lower, column0);
      }
      softmax[m].update(s[m], o[m], scale_log2);
      if (kRich && dropout.on) dropout.apply(s[m], row + 16 * m, n * kN);
    }

    if constexpr (kStages == 1) {
      ptx::cp_async_wait<0>();  // V(n) is here, and K(n) has been used by every warp
      __syncthreads();
      load_k(n + 1);
    }
    if (masked || (kRich && terms.bias != nullptr)) {
      settle_hidden_values<T, kDim, kThreads>(o, s, v_tile + n % kStages * kTileBytes);
    }
    multiply_pv<T, kDim>(o, s, v_lane + n % kStages * kTileBytes);
  }

  const float sink = kRich && p.sinks != nullptr ? p.sinks[tile.head] : -INFINITY;
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row + 16 * m + 8 * r;
      float factor;
      float lse = softmax[m].finish(r, scale_log2, sink, factor);
      if (i >= seq.queries) {  // blocks without a mask compute these rows too
        lse = -INFINITY;
        factor = 0.0f;
      }
      if (lane % 4 == 0 && i < seq.q_rows && p.lse != nullptr) p.lse[seq.lse_offset + head * seq.lse_head_stride + i] = lse;
      if (kRich && dropout.on) factor /= 1.0f - p.dropout_p;
#pragma unroll
      for (int f = 0; f < kFragsO; ++f) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) o[m][f][e] = factor == 0.0f ? 0.0f : o[m][f][e] * factor;
      }
    }
  }
  // Staged in the warp's own rows of Q's tile, which no other warp reads.
  T* out = static_cast<T*>(p.out) + seq.out_offset + head * p.out_stride[2] + (row0 + warp_row) * p.out_stride[1];
  store_output<T, kDim>(o, q_tile + warp_row * Layout::kRowBytes, out, p.out_stride[1],
                        min(Config::kRows, seq.q_rows - row0 - warp_row), head_dim_v, !kRich || args.aligned);
}

/// Launches the kernel of one head dimension; defined where it is instantiated, forward_sm80_<dim>.cu.
template <int kDim>
cudaError_t launch_forward(ForwardArgs& args, bool rich, int64_t l2_bytes, bool small_sm, cudaStream_t stream);

}  // namespace vivace::sm80
