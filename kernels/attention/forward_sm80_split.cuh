// The sm80 forward for head dimensions whose output fills the registers: see forward_sm80.cuh for what is common.
//
// At head_dim 192 and 256 a warp has registers for the output of 16 rows, and then reads K and V from shared memory once for
// every 16 rows: that, not the tensor cores, is the bound. So two warps share 32 rows. Each multiplies Q by half of a tile's
// keys, the probabilities meet in shared memory, and each multiplies all of them by half of V's columns:
//
//   warp 0   Q K[0, 32)^T   exp  -> P[:, 0, 32)   |  O[:, first half]  += P V[:, first half]
//   warp 1   Q K[32, 64)^T  exp  -> P[:, 32, 64)  |  O[:, second half] += P V[:, second half]
//                                                 the barrier that V(n) needs anyway
//
// Probabilities are relative to the row's maximum so far, or up to 2^8 more; that one of them is beyond is voted on at that
// barrier, and the block then takes the step's maxima in and computes its probabilities again.
#pragma once

#include "kernels/attention/forward_sm80_tile.cuh"

namespace vivace::sm80 {

template <int kM_, int kBlocksPerSm_>
struct SplitConfig {
  static constexpr int kM = kM_, kN = 64, kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 2 * kM;  // two warps for 32 rows
};
/// Two blocks of 64 rows an SM where they fit: the barriers of one do not hold up the other.
template <int kHeadDim, Sm kOf>
struct SplitTile : SplitConfig<64, 2> {};
template <>
struct SplitTile<256, Sm::kMedium> : SplitConfig<128, 1> {};

/// Q, K, V, P, and a float for each row and half.
template <int kDim, Sm kOf>
inline constexpr int kSplitSharedBytes = 2 * kDim*(SplitTile<kDim, kOf>::kM + 2 * SplitTile<kDim, kOf>::kN) +
                                         SplitTile<kDim, kOf>::kM*(2 * SplitTile<kDim, kOf>::kN + 8);

/// The columns of a warp: 16-byte chunks of a row of V, the first of each 16 columns d. Whole groups of 8 chunks, and half
/// of one where their number is odd, since the swizzle permutes chunks in such groups.
template <int kDim>
struct HalfColumns {
  using Layout = Swizzle<kDim>;
  static constexpr int kDims = kDim / 32;  // of 16 columns
  static constexpr int kWhole = kDim / 128 * 4;
  uint32_t whole, rest;  // this lane's ldmatrix addresses

  __device__ __forceinline__ static int chunk(int half, int d) {
    return d < kWhole ? kWhole * 2 * half + 2 * d : 4 * kWhole + 4 * half + 2 * (d - kWhole);
  }
  __device__ __forceinline__ HalfColumns(uint32_t tile, int half, int lane)
      : whole(tile + Layout::offset(lane % 16, chunk(half, 0) + lane / 16)),
        rest(tile + Layout::offset(lane % 16, chunk(half, kWhole) + lane / 16)) {}
  /// Fragment i of V: 16 keys x 16 columns, columns first.
  __device__ __forceinline__ void load(uint32_t (&frag)[4], int i) const {
    const int d = i % kDims;
    const uint32_t at = d < kWhole ? Layout::advance(whole, 2 * d) : Layout::advance(rest, 2 * (d - kWhole));
    ptx::ldmatrix_x4_trans(frag, at + 16 * (i / kDims) * Layout::kRowBytes);
  }
};

/// As add_values_not_finite of hidden_values.cuh, of P in shared memory: adds P * V of those elements of V that are not
/// finite to o, for the rows that see them. row: the thread's first, of rows row + 16 * m + {0, 8}; p_row: its number in the
/// tile; key0: the tile's first; half: of the columns. By one warp. Slow.
template <typename T, int kDim, int kFragsM, int kN>
__device__ __forceinline__ void add_shared_values_not_finite(float (&o)[kFragsM][kDim / 16][4], uint32_t p_tile,
                                                             uint32_t v_tile, const Sequence& seq, const Window& window,
                                                             int row, int p_row, int key0, int half) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int j = 0; j < kN; ++j) {
    float p[kFragsM][2];
    bool sees[kFragsM][2];
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 16 * m + 8 * r;
        const float2 pair = unpack2<T>(ptx::ld_shared(p_tile + Swizzle<kN>::offset(p_row + i, j / 8) + j % 8 / 2 * 4));
        p[m][r] = j % 2 == 0 ? pair.x : pair.y;
        sees[m][r] = VisibleKeys(seq, window, row + i).contains(key0 + j);
      }
    }
#pragma unroll
    for (int f = 0; f < kDim / 16; ++f) {
      const int chunk = HalfColumns<kDim>::chunk(half, f / 2) + f % 2;
      const uint32_t v = ptx::ld_shared(v_tile + Swizzle<kDim>::offset(j, chunk) + 4 * (lane % 4));
      const uint32_t v_bad = not_finite<T>(v);
      if (v_bad == 0) continue;
      const float2 x = unpack2<T>(v);
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!sees[m][r]) continue;
          if (v_bad & 0x8000u) o[m][f][2 * r] += p[m][r] * x.x;
          if (v_bad & 0x80000000u) o[m][f][2 * r + 1] += p[m][r] * x.y;
        }
      }
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void forward_split(const ForwardArgs& args) {
  using Config = SplitTile<kDim, kSm>;
  using Layout = Swizzle<kDim>;
  constexpr int kM = Config::kM, kN = Config::kN, kThreads = Config::kThreads, kRows = 32;  // kRows: of two warps
  constexpr int kFragsM = kRows / 16, kFragsS = kN / 16, kFragsO = kDim / 16, kStepsP = kN / 16;
  using PLayout = Swizzle<kN>;
  using Copy = TileCopy<T, kN, kDim, kThreads, false>;
  using Columns = HalfColumns<kDim>;

  const AttentionParams& p = args.params;
  const BlockRows<T> rows(args, kM);
  const Sequence& seq = rows.seq;
  if (rows.row0 >= seq.q_rows) return;
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared);           // (kM, kDim)
  const uint32_t k_tile = q_tile + kM * Layout::kRowBytes;       // (kN, kDim)
  const uint32_t v_tile = k_tile + kN * Layout::kRowBytes;       // (kN, kDim)
  const uint32_t p_tile = v_tile + kN * Layout::kRowBytes;       // (kM, kN)
  const uint32_t row_values = p_tile + kM * PLayout::kRowBytes;  // (2, kM) floats
  const KeyBlocks<kN> blocks(seq, args.window, rows.row0, kM);   // that any row sees
  if (!blocks.empty()) {
    load_rows<kM, kDim, kThreads, false>(q_tile, rows.q, rows.row0, 0, seq.queries, head_dim, true);
    load_rows<kN, kDim, kThreads, false>(k_tile, rows.k, blocks.begin * kN, seq.key_begin, seq.key_end, head_dim, true);
    ptx::cp_async_commit();
    load_rows<kN, kDim, kThreads, false>(v_tile, rows.v, blocks.begin * kN, seq.key_begin, seq.key_end, head_dim_v, true);
    ptx::cp_async_commit();
  }

  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int half = warp % 2, warp_row = warp / 2 * kRows;
  const int row = rows.row0 + warp_row + lane / 4;  // rows of this thread: row + 16 * m + {0, 8}
  // Where this lane points ldmatrix: Q and P as A operand, K as B operand, V as B operand by .trans.
  const SharedQ<kDim, kFragsM> q{q_tile + Layout::offset(warp_row + lane % 16, lane / 16)};
  const SharedQ<kN, kFragsM> probabilities{p_tile + PLayout::offset(warp_row + lane % 16, lane / 16)};
  const uint32_t k_lane = k_tile + Layout::offset(half * (kN / 2) + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const Columns v_columns(v_tile, half, lane);
  const uint32_t p_lane = p_tile + (warp_row + lane / 4) * PLayout::kRowBytes + 4 * (lane % 4);
  const uint32_t my_value = row_values + 4 * (half * kM + warp_row + lane / 4);
  const uint32_t other_value = row_values + 4 * ((1 - half) * kM + warp_row + lane / 4);
  const float scale_log2 = p.softmax_scale * kLog2E;

  WarpSoftmax<kFragsM> softmax;       // of all keys but for sum: of this warp's
  float o[kFragsM][kFragsO][4] = {};  // O: rows as above, 8 columns from chunk(half, f / 2) + f % 2; unnormalised

  // Whether copies may go piece by piece: rows in a row, as long as the tile's.
  const bool direct = rows.k.pages == nullptr && head_dim == kDim && head_dim_v == kDim;
  Copy k_copy(rows.k, (blocks.begin + 1) * kN), v_copy(rows.v, blocks.begin * kN);
  k_copy.to = k_tile + Copy::offset();
  v_copy.to = v_tile + Copy::offset();

  const auto step = [&](int n, auto careful) {
    constexpr bool kCareful = decltype(careful)::value;  // not every row sees every key, or copies do not go piece by piece
    const bool first = n == blocks.begin, more = n + 1 < blocks.end;
    // K(n) is here, and V(n - 1) and P have been used by every warp; of the first tile V is under way.
    if (first) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    if (kCareful && !direct && !first) {
      load_rows<kN, kDim, kThreads, false>(v_tile, rows.v, n * kN, seq.key_begin, seq.key_end, head_dim_v, true);
    }
    const bool copy_v = !first && (!kCareful || direct), copy_k = more && (!kCareful || direct);
    const int v_left = kCareful ? seq.key_end - n * kN - Copy::row() : kN, k_left = seq.key_end - (n + 1) * kN - Copy::row();
    float s[kFragsM][kFragsS][4];  // rows as o, keys n * kN + half * kN / 2 + 8 * f + 2 * (lane % 4) + {0, 1}
    uint32_t frags[kAhead][4];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_k<kDim, kFragsS>(frags[i], k_lane, i);
    multiply_qk<T, kDim, kFragsM, kFragsS>(s, q, k_lane, frags, [&](int d, int count) {
#pragma unroll
      for (int i = 0; i < Copy::kPieces; ++i) {
        if (i * count / Copy::kPieces / 2 == d) v_copy.piece_if(copy_v, i, rows.v.row_stride, v_left);
      }
    });
    ptx::cp_async_commit();

    const bool masked = kCareful && blocks.masked(n);
    if (masked) {
      const int column0 = n * kN + half * (kN / 2) + 2 * (lane % 4);
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
        const int i = ptx::opaque(row + 16 * m);  // or every row's interval takes registers through the loop
        const VisibleKeys upper(seq, args.window, i), lower(seq, args.window, i + 8);
        mask_scores(s[m], upper, lower, column0);
      }
    }
    softmax.see_all(s);
    const bool grew = softmax.grew(scale_log2);
    float sum[kFragsM][2];
    const auto exponentiate = [&] {  // scores to probabilities in shared memory
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
        sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
        for (int f = 0; f < kFragsS; ++f) {
          float x[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            x[e] = softmax.probability(s[m][f][e], scale_log2, m, e / 2);
            sum[m][e / 2] += x[e];
          }
          // As PLayout::offset: the row's last three bits are lane / 4.
          const uint32_t to = p_lane + 16 * m * PLayout::kRowBytes + (((half * kFragsS + f) ^ (lane / 4)) << 4);
          ptx::st_shared(to, pack2<T>(x[0], x[1]));
          ptx::st_shared(to + 8 * PLayout::kRowBytes, pack2<T>(x[2], x[3]));
        }
      }
    };
    if (!first) exponentiate();
    ptx::cp_async_wait<0>();
    bool hidden = false;  // whether V(n) has to be kept from rows that do not see it
    if (masked) hidden = __syncthreads_or(Copy::not_finite(v_tile));
    // V(n) and P are here, and K(n) has been used by every warp; the copy of K(n + 1) may start.
    if (__syncthreads_or(first || grew)) {
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          softmax.seen[m][r] = quad_max(softmax.seen[m][r]);
          if (lane % 4 == 0) ptx::st_shared(my_value + 4 * (16 * m + 8 * r), __float_as_uint(softmax.seen[m][r]));
        }
      }
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float other = __uint_as_float(ptx::ld_shared(other_value + 4 * (16 * m + 8 * r)));
          softmax.seen[m][r] = fmaxf(softmax.seen[m][r], other);
        }
      }
      softmax.raise(o, scale_log2, first);
      exponentiate();
      __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) softmax.sum[m][r] += sum[m][r];
    }
    if (kCareful && !direct && more) {
      load_rows<kN, kDim, kThreads, false>(k_tile, rows.k, (n + 1) * kN, seq.key_begin, seq.key_end, head_dim, true);
    }
    const auto multiply = [&](auto finite) {
      constexpr int kDims = Columns::kDims, kCount = kStepsP * kDims, kRing = kAhead + 1;
      uint32_t v_frags[kRing][4], p_frags[2][kFragsM][4];
      probabilities(p_frags[0], 0);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) v_columns.load(v_frags[i], i);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int d = i % kDims, j = i / kDims;
        if (i + kAhead < kCount) v_columns.load(v_frags[(i + kAhead) % kRing], i + kAhead);
        if (d == 0 && j + 1 < kStepsP) probabilities(p_frags[(j + 1) % 2], j + 1);
        uint32_t b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          b[e] = decltype(finite)::value ? finite_part<T>(v_frags[i % kRing][e]) : v_frags[i % kRing][e];
        }
#pragma unroll
        for (int m = 0; m < kFragsM; ++m) {
          ptx::mma_m16n8k16<T>(o[m][2 * d], p_frags[j % 2][m], b[0], b[1]);
          ptx::mma_m16n8k16<T>(o[m][2 * d + 1], p_frags[j % 2][m], b[2], b[3]);
        }
#pragma unroll
        for (int c = 0; c < Copy::kPieces; ++c) {
          if (c * kCount / Copy::kPieces == i) k_copy.piece_if(copy_k, c, rows.k.row_stride, k_left);
        }
      }
    };
    if (kCareful && hidden) {
      add_shared_values_not_finite<T, kDim, kFragsM, kN>(o, p_tile, v_tile, seq, args.window, row, warp_row + lane / 4,
                                                         n * kN, half);
      multiply(std::true_type());
    } else {
      multiply(std::false_type());
    }
    ptx::cp_async_commit();
    k_copy.next(rows.k.row_stride);
    v_copy.next(rows.v.row_stride);
  };
#pragma unroll 1
  for (int n = blocks.begin; n < blocks.end; ++n) {
    if (direct && !blocks.masked(n)) {
      step(n, std::false_type());
    } else {
      step(n, std::true_type());
    }
  }

  // The denominators of both warps; Q's tile has been used.
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax.sum[m][r] = quad_sum(softmax.sum[m][r]);
      if (lane % 4 == 0) ptx::st_shared(my_value + 4 * (16 * m + 8 * r), __float_as_uint(softmax.sum[m][r]));
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_tile = warp_row + 16 * m + 8 * r + lane / 4, i = rows.row0 + in_tile;
      const float other = __uint_as_float(ptx::ld_shared(other_value + 4 * (16 * m + 8 * r)));
      softmax.sum[m][r] = lane % 4 == 0 ? softmax.sum[m][r] + other : 0.0f;
      float factor;
      float lse = softmax.finish(m, r, -INFINITY, factor);
      if (i >= seq.queries) {  // steps without a mask compute these rows too
        lse = -INFINITY;
        factor = 0.0f;
      }
      if (half == 0 && lane % 4 == 0 && i < seq.q_rows && p.lse != nullptr) {
        p.lse[seq.lse_offset + rows.tile.head * seq.lse_head_stride + i] = lse;
      }
#pragma unroll
      for (int f = 0; f < kFragsO; ++f) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) x[e] = factor == 0.0f ? 0.0f : o[m][f][2 * r + e] * factor;
        const int chunk = Columns::chunk(half, f / 2) + f % 2;
        ptx::st_shared(q_tile + Layout::offset(in_tile, chunk) + 4 * (lane % 4), pack2<T>(x[0], x[1]));
      }
    }
  }
  __syncthreads();
  const int out_row = rows.row0 + 16 * warp;  // a warp stores 16 rows
  T* out = static_cast<T*>(p.out) + seq.out_offset + rows.tile.head * p.out_stride[2] + out_row * p.out_stride[1];
  store_staged<T, kDim>(q_tile + 16 * warp * Layout::kRowBytes, out, p.out_stride[1], min(16, seq.q_rows - out_row),
                        head_dim_v, true);
}

/// Plain calls; where splits() says so.
template <typename T, int kDim>
__global__ void __launch_bounds__(SplitTile<kDim, kSm>::kThreads, SplitTile<kDim, kSm>::kBlocksPerSm)
    attention_forward_split_kernel(const __grid_constant__ ForwardArgs args) {
  if constexpr (splits<kDim>(kSm)) forward_split<T, kDim>(args);
}

}  // namespace vivace::sm80
