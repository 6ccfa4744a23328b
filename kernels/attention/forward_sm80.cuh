// Attention forward on mma.sync tensor cores (sm_80 and newer): FlashAttention-2 (Dao, arXiv 2307.08691).
//
// A block takes kM queries of one head and walks over its keys in tiles of kN, S = Q K^T, online softmax, O += P V, with S,
// P and O in registers. Each warp owns kM / kWarps query rows, so that softmax needs no other warp. K and V tiles arrive by
// cp.async into one buffer each: V(n) during Q K(n) and K(n + 1) during P V(n). Tiles that every row of the block sees whole
// have a body without branches.
//
// At head_dim 64 there are two buffers, and the products of a step overlap the softmax of another:
// forward_sm80_pipelined.cuh. Above 128 two warps share 32 rows: forward_sm80_split.cuh.
//
//   head_dim |  kM x  kN  warps stages  shared  | why
//         64 | 128 x  64    4     2     48 KiB  | 32 rows a warp: one ldmatrix of K or V feeds twice the mma; Q in registers
//         96 | 128 x  64    4     1     48 KiB  | two blocks fit the 100 KiB of sm_86, 89 and 120
//        128 | 128 x  64    4     1     64 KiB  | S 64 + O 128 registers: Q is read again for each tile; two blocks an SM
//            | 128 x  32    4     1     48 KiB  | on sm_86, 89 and 120, for two blocks an SM
//  split 192 |  64 x  64    4     1   80.5 KiB  | two blocks an SM: one computes while the other waits at a barrier
//        256 |  64 x  64    4     1  104.5 KiB  | the same, where an SM has 228 KiB
//            | 128 x  64    8     1    145 KiB  | on sm_80
//  else  192 | 128 x  64    8     1     96 KiB  | 16 rows a warp, so that O (96 registers) fits; one block of 8 warps an SM
//        256 | 128 x  64    8     1    128 KiB  | O takes 128 registers
//            | 128 x  32    8     1     96 KiB  | 99 KiB are all there is on sm_86, 89 and 120
//
// head_dim and head_dim_v up to the tile's are zero-filled. Two variants: plain (masks, lengths and caches; scale > 0,
// 16-byte aligned rows) and rich (also softcap, alibi, bias, sinks, dropout, any alignment), so that the common call does
// not pay. Split is the plain variant where an SM has 164 KiB and more.
#pragma once

#include "kernels/attention/forward_sm80_finish.cuh"
#include "kernels/attention/forward_sm80_tile.cuh"

namespace vivace::sm80 {

template <typename T, int kDim, bool kRich>
__device__ __forceinline__ void forward(const ForwardArgs& args) {
  using Config = ForwardTile<kDim, kSmallSm>;
  using Layout = Swizzle<kDim>;
  constexpr int kM = Config::kM, kN = Config::kN, kThreads = Config::kThreads;
  constexpr int kFragsM = Config::kFragsM, kFragsS = kN / 8, kFragsO = kDim / 8, kStepsP = kN / 16;
  using Copy = TileCopy<T, kN, kDim, kThreads, kRich>;

  const AttentionParams& p = args.params;
  const BlockRows<T> rows(args, kM);
  const Sequence& seq = rows.seq;
  if (rows.row0 >= seq.q_rows) return;
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared);          // (kM, kDim)
  const uint32_t k_tile = q_tile + kM * Layout::kRowBytes;      // (kN, kDim)
  const uint32_t v_tile = k_tile + kN * Layout::kRowBytes;      // (kN, kDim)
  const KeyBlocks<kN> blocks(seq, args.window, rows.row0, kM);  // that any row sees
  if (!blocks.empty()) {
    load_rows<kM, kDim, kThreads, kRich>(q_tile, rows.q, rows.row0, 0, seq.queries, head_dim, args.aligned);
    load_rows<kN, kDim, kThreads, kRich>(k_tile, rows.k, blocks.begin * kN, seq.key_begin, seq.key_end, head_dim,
                                         args.aligned);
    ptx::cp_async_commit();
    load_rows<kN, kDim, kThreads, kRich>(v_tile, rows.v, blocks.begin * kN, seq.key_begin, seq.key_end, head_dim_v,
                                         args.aligned);
    ptx::cp_async_commit();
  }

  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int warp_row = warp * Config::kRows;
  const KeyBlocks<kN> mine(seq, args.window, rows.row0 + warp_row, Config::kRows);  // of them, that this warp's rows see
  // Where this lane points ldmatrix: Q as A operand, K as B operand, V as B operand by .trans.
  const SharedQ<kDim, kFragsM> q{q_tile + Layout::offset(warp_row + lane % 16, lane / 16)};
  const uint32_t k_lane = k_tile + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_lane = v_tile + Layout::offset(lane % 16, lane / 16);
  // Rows of this thread: row + 16 * m + {0, 8}.
  const int row = rows.row0 + warp_row + lane / 4;
  const ScoreTerms terms(p, rows.tile.batch, rows.tile.head);  // rich only, like dropout
  const Dropout dropout(p, rows.tile.batch, rows.tile.head);
  const bool has_terms = kRich && !terms.only_scale();
  const float scale_log2 = has_terms ? kLog2E : p.softmax_scale * kLog2E;

  WarpSoftmax<kFragsM> softmax;
  float o[kFragsM][kFragsO][4] = {};  // O: rows as above, columns 8 * f + 2 * (lane % 4) + {0, 1}; unnormalised

  const auto probabilities = [&](const auto& s) {
    return [&](uint32_t(&packed)[kFragsM][4], int j) {
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) pack_probabilities<T>(packed[m], s[m], j);
    };
  };
  // Whether copies may go piece by piece: rows in a row, as long as the tile's.
  const bool direct = !kRich && rows.k.pages == nullptr && head_dim == kDim && head_dim_v == kDim;

  Copy k_copy(rows.k, (blocks.begin + 1) * kN), v_copy(rows.v, blocks.begin * kN);
  uint32_t frags[kAhead][4];
#pragma unroll 1
  for (int n = blocks.begin; n < blocks.end; ++n) {
    // K(n) is here, and V(n - 1) has been used by every warp; of the first tile V is under way.
    if (n == blocks.begin) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    if constexpr (!kRich) {
      if (direct && !blocks.masked(n)) {  // every row of the block sees every key
        k_copy.to = k_tile + Copy::offset();
        v_copy.to = v_tile + Copy::offset();
        const bool copy_v = n > blocks.begin, copy_k = n + 1 < blocks.end;
        const int k_left = seq.key_end - (n + 1) * kN - Copy::row();
        float s[kFragsM][kFragsS][4];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) load_k<kDim, kFragsS>(frags[i], k_lane, i);
        multiply_qk<T, kDim, kFragsM, kFragsS>(s, q, k_lane, frags, [&](int d, int count) {
#pragma unroll
          for (int i = 0; i < Copy::kPieces; ++i) {
            if (i * count / Copy::kPieces / 2 == d) v_copy.piece_if(copy_v, i, rows.v.row_stride, kN);
          }
        });
        ptx::cp_async_commit();
        softmax.see_all(s);
        softmax.rescale(o, scale_log2, n == blocks.begin);
        ptx::cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kAhead; ++i) load_v<kDim>(frags[i], v_lane, i);
#pragma unroll
        for (int m = 0; m < kFragsM; ++m) softmax.exponentiate(s, scale_log2, m, 0);
        multiply_pv<T, kDim, kFragsM, kFragsS>(o, v_lane, frags, probabilities(s), [&](int i, int count) {
#pragma unroll
          for (int c = 0; c < Copy::kPieces; ++c) {
            if (c * count / Copy::kPieces == i) k_copy.piece_if(copy_k, c, rows.k.row_stride, k_left);
          }
          constexpr int kDims = kDim / 16;
          const int j = i / kDims + 1;
#pragma unroll
          for (int m = 0; m < kFragsM; ++m) {
            const bool now = j < kStepsP && i % kDims == (2 * m + 1) * kDims / (2 * kFragsM) - 1;
            if (now) softmax.exponentiate(s, scale_log2, m, j);
          }
        });
        ptx::cp_async_commit();
        k_copy.next(rows.k.row_stride);
        v_copy.next(rows.v.row_stride);
        continue;
      }
    }
    v_copy.on = false;
    if (n > blocks.begin) v_copy.start(v_tile, rows.v, n * kN, seq.key_begin, seq.key_end, head_dim_v, args.aligned);
    const SpreadCopies<Copy, true> copy_v{v_copy, rows.v.row_stride}, copy_k{k_copy, rows.k.row_stride};
    // V(n) is here, and K(n) has been used by every warp; the copy of K(n + 1) may start. What is not finite in V(n) is
    // added by add_bad to the rows that see it, and becomes zeros.
    const auto exchange = [&](const auto& add_bad) {
      v_copy.next(rows.v.row_stride);
      ptx::cp_async_wait<0>();
      if (blocks.masked(n) || (kRich && terms.bias != nullptr)) {
        if (kRich && !args.aligned) __syncthreads();
        if (__syncthreads_or(Copy::not_finite(v_tile))) {
          add_bad();
          __syncthreads();
          Copy::keep_finite(v_tile);
          __syncthreads();
        }
      } else {
        __syncthreads();
      }
      k_copy.on = false;
      if (n + 1 < blocks.end) {
        k_copy.start(k_tile, rows.k, (n + 1) * kN, seq.key_begin, seq.key_end, head_dim, args.aligned);
      }
    };
    if (n < mine.begin || n >= mine.end) {  // only copies
      copy_v.all();
      ptx::cp_async_commit();
      exchange([] {});
      copy_k.all();
      ptx::cp_async_commit();
      k_copy.next(rows.k.row_stride);
      continue;
    }

    float s[kFragsM][kFragsS][4];  // S, then P: rows as o, keys n * kN + 8 * f + 2 * (lane % 4) + {0, 1}
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_k<kDim, kFragsS>(frags[i], k_lane, i);
    multiply_qk<T, kDim, kFragsM, kFragsS>(s, q, k_lane, frags, copy_v);
    ptx::cp_async_commit();

    const bool masked = mine.masked(n);
    if (masked || has_terms) {
      const int column0 = n * kN + 2 * (lane % 4);
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
        const int i = ptx::opaque(row + 16 * m);  // or every row's interval takes registers through the loop
        const VisibleKeys upper(seq, args.window, i), lower(seq, args.window, i + 8);
        if (has_terms) terms.apply<T>(s[m], upper, lower, i, seq.keys - seq.queries, column0);
        if (masked) mask_scores(s[m], upper, lower, column0);
      }
    }
    softmax.see_all(s);
    softmax.rescale(o, scale_log2, n == blocks.begin);
    if constexpr (kRich) {
#pragma unroll
      for (int j = 0; j < kStepsP; ++j) {
#pragma unroll
        for (int m = 0; m < kFragsM; ++m) softmax.exponentiate(s, scale_log2, m, j);
      }
      if (dropout.on) {
#pragma unroll
        for (int m = 0; m < kFragsM; ++m) dropout.apply(s[m], row + 16 * m, n * kN);
      }
    }

    exchange([&] {
      add_values_not_finite<T, kDim>(
          o, s, v_tile, [&](float x, int m, int r) { return kRich ? x : softmax.probability(x, scale_log2, m, r); });
    });
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_v<kDim>(frags[i], v_lane, i);
    if constexpr (!kRich) {
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) softmax.exponentiate(s, scale_log2, m, 0);
    }
    // The exponentials of the next 16 keys between the mma of these.
    const auto between = [&](int i, int count) {
      copy_k(i, count);
      constexpr int kDims = kDim / 16;
      const int j = i / kDims + 1;
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
        const bool now = !kRich && j < kStepsP && i % kDims == (2 * m + 1) * kDims / (2 * kFragsM) - 1;
        if (now) softmax.exponentiate(s, scale_log2, m, j);
      }
    };
    multiply_pv<T, kDim, kFragsM, kFragsS>(o, v_lane, frags, probabilities(s), between);
    k_copy.next(rows.k.row_stride);
    ptx::cp_async_commit();
  }
  // Staged in the warp's own rows of Q's tile, which no other warp reads.
  finish_rows<T, kDim, kRich>(args, rows, warp_row, softmax, o, q_tile + warp_row * Layout::kRowBytes, dropout.on);
}

template <typename T, int kDim, bool kRich>
__global__ void __launch_bounds__(ForwardTile<kDim, kSmallSm>::kThreads, ForwardTile<kDim, kSmallSm>::kBlocksPerSm)
    attention_forward_kernel(const __grid_constant__ ForwardArgs args) {
  if constexpr (kRich || !splits<kDim>(kSm)) forward<T, kDim, kRich>(args);
}

/// Launches the kernel of one head dimension; defined where it is instantiated, forward_sm80_<dim>.cu.
template <int kDim>
cudaError_t launch_forward(ForwardArgs& args, bool rich, int64_t l2_bytes, Sm sm, cudaStream_t stream);

}  // namespace vivace::sm80
