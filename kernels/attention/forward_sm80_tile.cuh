// What the sm80 forward kernels are made of: tiles, copies of K and V, products.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention/epilogue.cuh"
#include "kernels/attention/forward_sm80_softmax.cuh"
#include "kernels/attention/hidden_values.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/swizzle.cuh"
#include "kernels/attention/tile_scheduler.cuh"
#include "kernels/common/ptx.cuh"

namespace vivace::sm80 {

/// What a launch passes.
struct ForwardArgs {
  AttentionParams params;
  Window window;
  TileOrder order;
  FastDivmod by_head_group;  // query heads that share a head of k and v
  FastDivmod page_size;
  bool aligned;  // every row of q, k, v and out starts at a multiple of 16 bytes and is as long
};

/// kM queries a block, kM / kWarps a warp; tiles of kN keys, taken in steps of kStep.
template <int kM_, int kN_, int kStep_, int kWarps_, int kStages_, int kBlocksPerSm_>
struct TileConfig {
  static constexpr int kM = kM_, kN = kN_, kStep = kStep_, kWarps = kWarps_, kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kM / kWarps;  // of a warp
  static constexpr int kFragsM = kRows / 16;
  static constexpr bool kPipelined = kStages == 2;
};

/// Shared memory of a multiprocessor: 100 KiB (sm_86, 89, 120; sm_87 has 164 and is taken for one of them), 164 (sm_80),
/// more.
enum class Sm { kSmall, kMedium, kLarge };
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800
inline constexpr Sm kSm = Sm::kMedium;
#elif __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200
inline constexpr Sm kSm = Sm::kSmall;
#else
inline constexpr Sm kSm = Sm::kLarge;
#endif
inline constexpr bool kSmallSm = kSm == Sm::kSmall;

template <int kHeadDim, bool kSmall>
struct ForwardTile;
template <bool kSmall>
struct ForwardTile<64, kSmall> : TileConfig<128, 64, 32, 4, 2, 2> {};
template <bool kSmall>
struct ForwardTile<96, kSmall> : TileConfig<128, 64, 64, 4, 1, 2> {};
template <bool kSmall>
struct ForwardTile<128, kSmall> : TileConfig<128, kSmall ? 32 : 64, kSmall ? 32 : 64, 4, 1, 2> {};
template <bool kSmall>
struct ForwardTile<192, kSmall> : TileConfig<128, 64, 64, 8, 1, 1> {};
template <bool kSmall>
struct ForwardTile<256, kSmall> : TileConfig<128, kSmall ? 32 : 64, kSmall ? 32 : 64, 8, 1, 1> {};

/// Whether plain calls take forward_sm80_split.cuh.
template <int kHeadDim>
constexpr bool splits(Sm sm) {
  return kHeadDim > 128 && sm != Sm::kSmall;
}

template <int kHeadDim, bool kSmall>
inline constexpr int kSharedBytes = 2 * kHeadDim*(ForwardTile<kHeadDim, kSmall>::kM +
                                                  2 * ForwardTile<kHeadDim, kSmall>::kStages *
                                                      ForwardTile<kHeadDim, kSmall>::kN);

/// Where one block's queries and their keys lie.
template <typename T>
struct BlockRows {
  Tile tile;
  Sequence seq;
  int row0;  // first query
  RowSource<T> q, k, v;

  __device__ __forceinline__ BlockRows(const ForwardArgs& args, int rows)
      : tile(args.order(blockIdx.x)), seq(args.params, tile.batch), row0(tile.m_block * rows) {
    const AttentionParams& p = args.params;
    int head_kv, in_group;
    args.by_head_group(tile.head, head_kv, in_group);
    q = {static_cast<const T*>(p.q) + seq.q_offset + tile.head * p.q_stride[2], p.q_stride[1]};
    k = {static_cast<const T*>(p.k) + seq.k_offset + head_kv * p.k_stride[2], p.k_stride[1], seq.pages, p.k_stride[0],
         args.page_size};
    v = {static_cast<const T*>(p.v) + seq.v_offset + head_kv * p.v_stride[2], p.v_stride[1], seq.pages, p.v_stride[0],
         args.page_size};
  }
};

/// Starts the copy of any kRows rows, all at once; see load_tile_async.
template <int kRows, int kDim, int kThreads, bool kRich, typename T>
__device__ __forceinline__ void load_rows(uint32_t to, const RowSource<T>& from, int first, int begin, int end, int dim,
                                          bool aligned) {
  if (!kRich || aligned) {
    load_tile_async<kRows, kDim, kThreads>(to, from, first, begin, end, dim);
  } else {
    load_tile_elements<kRows, kDim, kThreads>(to, from, first, begin, end, dim);
  }
}

/// As ptx::cp_async_16 of 16 bytes, where `on`: predicated, so that no branch cuts the instructions around it apart.
__device__ __forceinline__ void cp_async_16_if(bool on, uint32_t shared, const void* global) {
  asm volatile(
      "{\n"
      ".reg .pred on;\n"
      "setp.ne.b32 on, %2, 0;\n"
      "@on cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(on))
      : "memory");
}

/// The same of `bytes` bytes, the rest of 16 zeros.
__device__ __forceinline__ void cp_async_16_if(bool on, uint32_t shared, const void* global, int bytes) {
  asm volatile(
      "{\n"
      ".reg .pred on;\n"
      "setp.ne.b32 on, %2, 0;\n"
      "@on cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %3;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(on)), "r"(bytes)
      : "memory");
}

/// Copies tile after tile of kRows consecutive rows of K or V, in pieces that stand between the mma of a product: issued in
/// a row, copies hold up the warp.
template <typename T, int kRows, int kDim, int kThreads, bool kRich>
struct TileCopy {
  using Layout = Swizzle<kDim>;
  static constexpr int kRowsAtOnce = kThreads / Layout::kRowLanes;
  static constexpr int kPieces = kRows / kRowsAtOnce;

  const T* from;  // this thread's part of the tile's first row
  uint32_t to;    // where that goes
  bool on;        // whether the tile goes piece by piece

  __device__ __forceinline__ static int row() { return threadIdx.x / Layout::kRowLanes; }
  __device__ __forceinline__ static int chunk() { return threadIdx.x % Layout::kRowLanes; }
  __device__ __forceinline__ static uint32_t offset() { return Layout::offset(row(), chunk()); }

  /// first: row of the first tile.
  __device__ __forceinline__ TileCopy(const RowSource<T>& rows, int first)
      : from(rows.base + (first + row()) * rows.row_stride + 8 * chunk()), to(0), on(false) {}

  /// Prepares the copy of the tile at row `first` to shared memory at `tile`. Tiles that are not whole go at once.
  __device__ __forceinline__ void start(uint32_t tile, const RowSource<T>& rows, int first, int begin, int end, int dim,
                                        bool aligned) {
    to = tile + offset();
    on = rows.pages == nullptr && dim == kDim && (!kRich || aligned) && first >= begin && first + kRows <= end;
    if (!on) load_rows<kRows, kDim, kThreads, kRich>(tile, rows, first, begin, end, dim, aligned);
  }

  /// Piece i of a tile that is `on`.
  __device__ __forceinline__ void piece(int i, int64_t row_stride) const {
#pragma unroll
    for (int c = 0; c < kDim / 8; c += Layout::kRowLanes) {
      cp_async_16_if(on, to + i * kRowsAtOnce * Layout::kRowBytes + 16 * c, from + i * kRowsAtOnce * row_stride + 8 * c);
    }
  }

  /// Piece i of a tile of which `left` rows exist from this thread's first one on; the others become zeros.
  __device__ __forceinline__ void piece_of_rows(int i, int64_t row_stride, int left) const {
    const int bytes = i * kRowsAtOnce < left ? 16 : 0;
#pragma unroll
    for (int c = 0; c < kDim / 8; c += Layout::kRowLanes) {
      ptx::cp_async_16(to + i * kRowsAtOnce * Layout::kRowBytes + 16 * c, from + i * kRowsAtOnce * row_stride + 8 * c,
                       bytes);
    }
  }

  /// The same where `wanted`; `on` does not count.
  __device__ __forceinline__ void piece_if(bool wanted, int i, int64_t row_stride, int left) const {
    const int bytes = i * kRowsAtOnce < left ? 16 : 0;
#pragma unroll
    for (int c = 0; c < kDim / 8; c += Layout::kRowLanes) {
      cp_async_16_if(wanted, to + i * kRowsAtOnce * Layout::kRowBytes + 16 * c, from + i * kRowsAtOnce * row_stride + 8 * c,
                     bytes);
    }
  }

  __device__ __forceinline__ void next(int64_t row_stride) { from += kRows * row_stride; }

  /// Whether this thread's part of a complete tile has elements that are not finite. After cp.async's wait alone: a thread
  /// sees what it copied.
  __device__ __forceinline__ static bool not_finite(uint32_t tile) {
    uint32_t bad = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int c = 0; c < kDim / 8; c += Layout::kRowLanes) {
        const uint4 x = ptx::ld_shared_v4(tile + offset() + i * kRowsAtOnce * Layout::kRowBytes + 16 * c);
        bad |= vivace::not_finite<T>(x.x) | vivace::not_finite<T>(x.y) | vivace::not_finite<T>(x.z) |
               vivace::not_finite<T>(x.w);
      }
    }
    return bad != 0;
  }

  /// Makes zeros of them.
  __device__ __forceinline__ static void keep_finite(uint32_t tile) {
#pragma unroll 1
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll 1
      for (int c = 0; c < kDim / 8; c += Layout::kRowLanes) {
        const uint32_t at = tile + offset() + i * kRowsAtOnce * Layout::kRowBytes + 16 * c;
        const uint4 x = ptx::ld_shared_v4(at);
        ptx::st_shared(at, make_uint4(finite_part<T>(x.x), finite_part<T>(x.y), finite_part<T>(x.z), finite_part<T>(x.w)));
      }
    }
  }
};

/// The pieces of a tile spread over the steps of a product; kEarly: over its first half.
template <typename Copy, bool kEarly>
struct SpreadCopies {
  const Copy& copy;
  int64_t row_stride;

  __device__ __forceinline__ void operator()(int step, int steps) const {
#pragma unroll
    for (int i = 0; i < Copy::kPieces; ++i) {
      if (i * steps / Copy::kPieces / (kEarly ? 2 : 1) == step) copy.piece(i, row_stride);
    }
  }
  __device__ __forceinline__ void all() const {
#pragma unroll
    for (int i = 0; i < Copy::kPieces; ++i) copy.piece(i, row_stride);
  }
};
/// Stands between the mma of a product where nothing else does.
struct Nothing {
  __device__ __forceinline__ void operator()(int, int) const {}
};

/// Fragment i of K for a step's product, as B operand: 16 keys x 16 dims, keys first. k: this lane's ldmatrix address.
template <int kDim, int kFragsS>
__device__ __forceinline__ void load_k(uint32_t (&frag)[4], uint32_t k, int i) {
  using Layout = Swizzle<kDim>;
  constexpr int kKeys = kFragsS / 2;
  ptx::ldmatrix_x4(frag, Layout::advance(k, 2 * (i / kKeys)) + 16 * (i % kKeys) * Layout::kRowBytes);
}

/// Fragment i of V: 16 keys x 16 dims, dims first.
template <int kDim>
__device__ __forceinline__ void load_v(uint32_t (&frag)[4], uint32_t v, int i) {
  using Layout = Swizzle<kDim>;
  constexpr int kDims = kDim / 16;
  ptx::ldmatrix_x4_trans(frag, Layout::advance(v, 2 * (i % kDims)) + 16 * (i / kDims) * Layout::kRowBytes);
}

/// Fragments of K or V that are loaded ahead of the mma that use them.
inline constexpr int kAhead = 2;

/// Q's fragments: of a lane's ldmatrix address, read again for each product, or held in registers.
template <int kDim, int kFragsM>
struct SharedQ {
  uint32_t address;
  __device__ __forceinline__ void operator()(uint32_t (&frags)[kFragsM][4], int d) const {
    using Layout = Swizzle<kDim>;
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      ptx::ldmatrix_x4(frags[m], Layout::advance(address, 2 * d) + 16 * m * Layout::kRowBytes);
    }
  }
};
template <int kDim, int kFragsM>
struct HeldQ {
  uint32_t held[kDim / 16][kFragsM][4];
  __device__ __forceinline__ void load(uint32_t address) {
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) SharedQ<kDim, kFragsM>{address}(held[d], d);
  }
  __device__ __forceinline__ void operator()(uint32_t (&frags)[kFragsM][4], int d) const {
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) frags[m][i] = held[d][m][i];
    }
  }
};

/// s = Q K^T of one step. first: its first fragments of K; between(d, kDim / 16) stands behind the mma of 16 dims each.
template <typename T, int kDim, int kFragsM, int kFragsS, typename Q, typename Between>
__device__ __forceinline__ void multiply_qk(float (&s)[kFragsM][kFragsS][4], const Q& q, uint32_t k,
                                            const uint32_t (&first)[kAhead][4], const Between& between) {
  constexpr int kKeys = kFragsS / 2, kDims = kDim / 16, kCount = kKeys * kDims, kRing = kAhead + 1;
  uint32_t k_frags[kRing][4], q_frags[2][kFragsM][4];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) k_frags[i][e] = first[i][e];
  }
  q(q_frags[0], 0);
#pragma unroll
  for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
    for (int f = 0; f < kFragsS; ++f) s[m][f][0] = s[m][f][1] = s[m][f][2] = s[m][f][3] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = i / kKeys, f = i % kKeys * 2;
    if (i + kAhead < kCount) load_k<kDim, kFragsS>(k_frags[(i + kAhead) % kRing], k, i + kAhead);
    if (f == 0 && d + 1 < kDims) q(q_frags[(d + 1) % 2], d + 1);
    const uint32_t(&b)[4] = k_frags[i % kRing];
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      ptx::mma_m16n8k16<T>(s[m][f], q_frags[d % 2][m], b[0], b[1]);
      ptx::mma_m16n8k16<T>(s[m][f + 1], q_frags[d % 2][m], b[2], b[3]);
    }
    if (i % kKeys == kKeys - 1) between(d, kDims);
  }
}

/// Probabilities of 16 keys, rounded to T, as A operand: an accumulator's layout is an A fragment's.
template <typename T, int kFragsS>
__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[4], const float (&s)[kFragsS][4], int j) {
  p[0] = pack2<T>(s[2 * j][0], s[2 * j][1]);
  p[1] = pack2<T>(s[2 * j][2], s[2 * j][3]);
  p[2] = pack2<T>(s[2 * j + 1][0], s[2 * j + 1][1]);
  p[3] = pack2<T>(s[2 * j + 1][2], s[2 * j + 1][3]);
}

/// o += P V of one step. first: its first fragments of V; probabilities(p, j) gives those of keys 16 * j to 16 * j + 16;
/// between(i, n) stands behind the mma of each of V's n fragments. kFinitePart: of V's finite elements alone.
template <typename T, int kDim, int kFragsM, int kFragsS, bool kFinitePart = false, typename Probabilities, typename Between>
__device__ __forceinline__ void multiply_pv(float (&o)[kFragsM][kDim / 8][4], uint32_t v, const uint32_t (&first)[kAhead][4],
                                            const Probabilities& probabilities, const Between& between) {
  constexpr int kDims = kDim / 16, kCount = kFragsS / 2 * kDims, kRing = kAhead + 1;
  uint32_t v_frags[kRing][4], p[kFragsM][4];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) v_frags[i][e] = first[i][e];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int d = i % kDims * 2;
    if (d == 0) probabilities(p, i / kDims);
    if (i + kAhead < kCount) load_v<kDim>(v_frags[(i + kAhead) % kRing], v, i + kAhead);
    uint32_t b[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) b[e] = kFinitePart ? finite_part<T>(v_frags[i % kRing][e]) : v_frags[i % kRing][e];
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
      ptx::mma_m16n8k16<T>(o[m][d], p[m], b[0], b[1]);
      ptx::mma_m16n8k16<T>(o[m][d + 1], p[m], b[2], b[3]);
    }
    between(i, kCount);
  }
}

}  // namespace vivace::sm80
