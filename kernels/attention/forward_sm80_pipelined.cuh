// The sm80 forward for head dimensions that leave registers free: see forward_sm80.cuh for what is common.
//
// A tile of kN keys is taken in two steps. The scores of step i + 1 are computed while those of step i become probabilities,
// so that mma and the exponential run at the same time in each warp:
//
//   Q K(i + 1)   and   P(i) = 2^S(i), rounded
//   O += P(i) V(i)
//
// K therefore runs half a tile ahead of V: K's tile t holds the keys [first + t * kN - kStep, first + t * kN + kStep), V's
// tile t those from first + t * kN on. Two buffers each; K(t + 2) and V(t + 1) arrive during pair t of steps, one barrier a
// pair. The body for whole, unmasked steps has no branch but for the rare large sum; the other one takes every case.
#pragma once

#include "kernels/attention/forward_sm80_finish.cuh"
#include "kernels/attention/forward_sm80_tile.cuh"

namespace vivace::sm80 {

template <typename T, int kDim, bool kRich>
__global__ void __launch_bounds__(ForwardTile<kDim, kSmallSm>::kThreads, ForwardTile<kDim, kSmallSm>::kBlocksPerSm)
    attention_forward_pipelined_kernel(const __grid_constant__ ForwardArgs args) {
  using Config = ForwardTile<kDim, kSmallSm>;
  using Layout = Swizzle<kDim>;
  constexpr int kM = Config::kM, kN = Config::kN, kStep = Config::kStep, kThreads = Config::kThreads;
  constexpr int kFragsM = Config::kFragsM, kFragsS = kStep / 8, kFragsO = kDim / 8, kStepsP = kStep / 16;
  constexpr int kTileBytes = kN * Layout::kRowBytes, kStepBytes = kStep * Layout::kRowBytes;
  static_assert(kN == 2 * kStep);
  using Copy = TileCopy<T, kN, kDim, kThreads, kRich>;
  using Scores = float[kFragsM][kFragsS][4];
  using Frags = uint32_t[kAhead][4];

  const AttentionParams& p = args.params;
  const BlockRows<T> rows(args, kM);
  const Sequence& seq = rows.seq;
  if (rows.row0 >= seq.q_rows) return;
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared);      // (kM, kDim)
  const uint32_t k_tile = q_tile + kM * Layout::kRowBytes;  // (2, kN, kDim)
  const uint32_t v_tile = k_tile + 2 * kTileBytes;          // (2, kN, kDim)
  const KeyBlocks<kStep> steps(seq, args.window, rows.row0, kM);
  const int first = steps.begin * kStep, pairs = (steps.end - steps.begin + 1) / 2;
  const auto copy_first = [&] {  // K(0), of which there is half
    load_rows<kStep, kDim, kThreads, kRich>(k_tile + kStepBytes, rows.k, first, seq.key_begin, seq.key_end, head_dim,
                                            args.aligned);
    ptx::cp_async_commit();
    load_rows<kN, kDim, kThreads, kRich>(k_tile + kTileBytes, rows.k, first + kStep, seq.key_begin, seq.key_end, head_dim,
                                         args.aligned);
    load_rows<kN, kDim, kThreads, kRich>(v_tile, rows.v, first, seq.key_begin, seq.key_end, head_dim_v, args.aligned);
    ptx::cp_async_commit();
  };
  if (pairs > 0) {
    load_rows<kM, kDim, kThreads, kRich>(q_tile, rows.q, rows.row0, 0, seq.queries, head_dim, args.aligned);
    copy_first();
  }

  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int warp_row = warp * Config::kRows;
  const KeyBlocks<kStep> mine(seq, args.window, rows.row0 + warp_row, Config::kRows);  // steps that this warp's rows see
  const int my_pairs = mine.empty() ? 0 : (mine.end - steps.begin + 1) / 2;
  // Where this lane points ldmatrix: K as B operand, V as B operand by .trans.
  const uint32_t k_lane = k_tile + Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_lane = v_tile + Layout::offset(lane % 16, lane / 16);
  // Rows of this thread: row + 16 * m + {0, 8}.
  const int row = rows.row0 + warp_row + lane / 4;
  const ScoreTerms terms(p, rows.tile.batch, rows.tile.head);  // rich only, like dropout
  const Dropout dropout(p, rows.tile.batch, rows.tile.head);
  const bool has_terms = kRich && !terms.only_scale();
  const float scale_log2 = has_terms ? kLog2E : p.softmax_scale * kLog2E;

  HeldQ<kDim, kFragsM> q;
  if (pairs > 0) {
    ptx::cp_async_wait<1>();  // Q and K(0) are here
    __syncthreads();
    q.load(q_tile + Layout::offset(warp_row + lane % 16, lane / 16));
  }

  WarpSoftmax<kFragsM> softmax;
  float o[kFragsM][kFragsO][4] = {};  // O: rows as above, columns 8 * f + 2 * (lane % 4) + {0, 1}; unnormalised
  Scores s0, s1;                      // of two steps: S, then P
  Frags frags;

  // Whether copies may go piece by piece: rows in a row, as long as the tile's.
  const bool direct = rows.k.pages == nullptr && head_dim == kDim && head_dim_v == kDim && (!kRich || args.aligned);
  const auto preload_k = [&](uint32_t at) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_k<kDim, kFragsS>(frags[i], k_lane + at, i);
  };
  const auto preload_v = [&](uint32_t at) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_v<kDim>(frags[i], v_lane + at, i);
  };
  const auto see_all = [&](const Scores& s, bool first = false) {
    softmax.see_all(s);
    softmax.rescale(o, scale_log2, first);
  };
  // Part i of n of a step's exponentials.
  const auto exponentials = [&](Scores& s, int i, int n) {
    constexpr int kChunks = kFragsM * kStepsP;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c * n / kChunks == i) softmax.exponentiate(s, scale_log2, c / kStepsP, c % kStepsP);
    }
  };
  const auto mask = [&](Scores& s, int n) {  // of step n
    const bool masked = mine.masked(n);
    if (!masked && !has_terms) return;
    const int column0 = n * kStep + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      const int i = ptx::opaque(row + 16 * m);  // or every row's interval takes registers through the loop
      const VisibleKeys upper(seq, args.window, i), lower(seq, args.window, i + 8);
      if (has_terms) terms.apply<T>(s[m], upper, lower, i, seq.keys - seq.queries, column0);
      if (masked) mask_scores(s[m], upper, lower, column0);
    }
  };

  Copy k_copy(rows.k, first + kStep + kN), v_copy(rows.v, first + kN);
  if (my_pairs > 0) {
    preload_k(kStepBytes);
    multiply_qk<T, kDim, kFragsM, kFragsS>(s0, q, k_lane + kStepBytes, frags, Nothing());
    mask(s0, steps.begin);
    see_all(s0, true);
  }
#pragma unroll 1
  for (int t = 0; t < pairs; ++t) {
    const int n = steps.begin + 2 * t;
    const uint32_t v_at = t % 2 * kTileBytes, k_at = (t + 1) % 2 * kTileBytes;
    const uint32_t next_v_at = k_at, next_k_at = v_at;
    const int next_k = first + (t + 2) * kN - kStep, next_v = first + (t + 1) * kN;  // keys of the tiles to be copied
    const bool careful = steps.masked(n) || steps.masked(n + 1) || (kRich && (has_terms || dropout.on));
    const bool fast = direct && !careful && t + 1 < my_pairs && !mine.masked(n + 2);
    ptx::cp_async_wait<0>();  // K(t + 1) and V(t) are here, and every warp has used K(t) and V(t - 1)
    bool hidden = false;      // whether V(t) has to be kept from rows that do not see it
    if (careful) {
      if (kRich && !args.aligned) __syncthreads();
      hidden = __syncthreads_or(Copy::not_finite(v_tile + v_at));
    } else {
      __syncthreads();
    }
    // s1 = Q K^T of step n + 1 and P of step n; s0 = Q K^T of step n + 2 and P of step n + 1.
    const auto first_scores = [&](const auto& copies) {
      multiply_qk<T, kDim, kFragsM, kFragsS>(s1, q, k_lane + k_at, frags, [&](int d, int count) {
        copies(d, count);
        exponentials(s0, d, count);
      });
    };
    const auto second_scores = [&] {
      multiply_qk<T, kDim, kFragsM, kFragsS>(s0, q, k_lane + k_at + kStepBytes, frags,
                                             [&](int d, int count) { exponentials(s1, d, count); });
    };

    if (fast) {
      preload_k(k_at);
      k_copy.to = k_tile + next_k_at + Copy::offset();
      v_copy.to = v_tile + next_v_at + Copy::offset();
      const int k_left = seq.key_end - next_k - Copy::row(), v_left = seq.key_end - next_v - Copy::row();
      // O += P V, and the maximum of the next scores where it has to be known.
      const auto product = [&](const Scores& s, const Scores& next, uint32_t at) {
        preload_v(at);
        const auto probabilities = [&](uint32_t(&packed)[kFragsM][4], int j) {
#pragma unroll
          for (int m = 0; m < kFragsM; ++m) pack_probabilities<T>(packed[m], s[m], j);
        };
        const auto between = [&](int i, int count) {
#pragma unroll
          for (int c = 0; c < kFragsM * kFragsS; ++c) {
            if (c * count / (kFragsM * kFragsS) == i) softmax.see(next, c);
          }
        };
        multiply_pv<T, kDim, kFragsM, kFragsS>(o, v_lane + at, frags, probabilities, between);
      };
      first_scores([&](int d, int count) {
#pragma unroll
        for (int i = 0; i < Copy::kPieces; ++i) {
          if (i * count / Copy::kPieces != d) continue;
          k_copy.piece_of_rows(i, rows.k.row_stride, k_left);
          v_copy.piece_of_rows(i, rows.v.row_stride, v_left);
        }
      });
      ptx::cp_async_commit();
      product(s0, s1, v_at);
      preload_k(k_at + kStepBytes);
      softmax.rescale(o, scale_log2);
      second_scores();
      product(s1, s0, v_at + kStepBytes);
      softmax.rescale(o, scale_log2);
    } else {
      if (t + 1 < pairs) {
        load_rows<kN, kDim, kThreads, kRich>(k_tile + next_k_at, rows.k, next_k, seq.key_begin, seq.key_end, head_dim,
                                             args.aligned);
        load_rows<kN, kDim, kThreads, kRich>(v_tile + next_v_at, rows.v, next_v, seq.key_begin, seq.key_end, head_dim_v,
                                             args.aligned);
      }
      ptx::cp_async_commit();
      if (t < my_pairs) {
        preload_k(k_at);
        const auto product = [&](Scores& s, int key, uint32_t at) {
          if (kRich && dropout.on) {
#pragma unroll
            for (int m = 0; m < kFragsM; ++m) dropout.apply(s[m], row + 16 * m, key);
          }
          const auto probabilities = [&](uint32_t(&packed)[kFragsM][4], int j) {
#pragma unroll
            for (int m = 0; m < kFragsM; ++m) pack_probabilities<T>(packed[m], s[m], j);
          };
          preload_v(at);
          if (hidden) {
            add_values_not_finite<T, kDim>(o, s, v_tile + at, [](float p, int, int) { return p; });
            multiply_pv<T, kDim, kFragsM, kFragsS, true>(o, v_lane + at, frags, probabilities, Nothing());
          } else {
            multiply_pv<T, kDim, kFragsM, kFragsS>(o, v_lane + at, frags, probabilities, Nothing());
          }
        };
        first_scores(Nothing());
        product(s0, n * kStep, v_at);
        mask(s1, n + 1);
        see_all(s1);
        const bool more = t + 1 < my_pairs;
        if (more) {
          preload_k(k_at + kStepBytes);
          second_scores();
        } else {
          exponentials(s1, 0, 1);
        }
        product(s1, (n + 1) * kStep, v_at + kStepBytes);
        if (more) {
          mask(s0, n + 2);
          see_all(s0);
        }
      }
    }
    k_copy.next(rows.k.row_stride);
    v_copy.next(rows.v.row_stride);
  }
  // Staged in the warp's own rows of Q's tile, which no other warp reads.
  finish_rows<T, kDim, kRich>(args, rows, warp_row, softmax, o, q_tile + warp_row * Layout::kRowBytes, dropout.on);
}

}  // namespace vivace::sm80
