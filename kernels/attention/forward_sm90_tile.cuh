// What the roles of the sm90 forward kernel share: its variants, shared memory, arguments, and the walk through the tiles.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/attention/forward_sm90_order.cuh"
#include "kernels/attention/forward_sm90_shape.cuh"
#include "kernels/common/tma.cuh"

namespace vivace::sm90 {

/// kMasked: causal or window, the keys that a tile sees depend on its rows. kRagged: lengths come from device memory
/// (variable length, or a cache); a ragged kernel is a masked one.
template <typename Element, int kHeadDim, TileShape kShape, bool kMasked, bool kRagged>
struct ForwardTraits {
  static_assert(kMasked || !kRagged);
  using element = Element;
  static constexpr int head_dim = kHeadDim;
  static constexpr int keys = kShape.keys;
  static constexpr int consumers = kShape.consumers;
  static constexpr int stages = kShape.stages;
  static constexpr int q_stages = kShape.q_stages;
  static constexpr bool turns = kShape.turns;
  static constexpr bool stores_tma = kShape.stores_tma;
  static constexpr bool masked = kMasked;
  static constexpr bool ragged = kRagged;
  static constexpr int rows = 64 * consumers;
  static constexpr int threads = 128 * (consumers + 1);
  static constexpr int chunks = (kHeadDim + 63) / 64;  // of 64 elements, the width of a swizzled row
  // Their sum over the block is at most what it was launched with (640 x 96, 512 x 128, 384 x 168 or 256 x 248 threads and
  // registers): setmaxnreg would wait for ever.
  static constexpr int producer_registers = consumers >= 3 ? 32 : kHeadDim > 128 ? 24 : 40;
  static constexpr int consumer_registers = consumers == 4   ? 112
                                            : consumers == 3 ? 160
                                            : consumers == 1 ? 248
                                            : kHeadDim > 128 ? 240
                                                             : 232;
};

inline constexpr int kTileRing = 4;  // tiles that the consumers are told of; they look back one
inline constexpr int kBits = 512;    // of sets of tiles and blocks; numbers beyond share them

/// What the kernel needs besides the tensor maps. Strides are in elements: batch, row, head.
struct ForwardArgs {
  float* lse;
  void* out;
  const void* v;
  int64_t out_stride[3], v_stride[3];
  int64_t lse_head_stride, lse_batch_stride;
  int32_t batch, heads, group;  // group = heads / heads_kv
  int32_t head_dim;             // the columns of the tensors; the kernel works on Traits::head_dim, with zeros after them
  int32_t seqlen_q,
      seqlen_k;        // dense: of every batch entry; ragged: where no array below says otherwise; capacity of a cache
  int32_t row_blocks;  // dense: ceil(seqlen_q / rows)
  int32_t tiles;       // row_blocks * batch * heads; ragged: an upper bound
  MaskedOrder order;   // dense and masked
  int32_t window_left, window_right;  // -1: open
  float scale_log2;                   // softmax_scale * log2(e)
  float softmax_scale;
  // Ragged only, as in AttentionParams
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_q, *seqused_k, *cache_seqlens, *cache_batch_idx;
  int32_t has_cache,
      appended;  // appended: keys that this call added to every cache row; -1: as many as the entry has queries
};

/// Lengths and place of a batch entry. (Sequence of sequence.cuh gives pointers; the copy engine wants coordinates.)
/// Dense: everything is in the arguments, and takes no register.
template <bool kRagged>
struct Lengths {
  __device__ __forceinline__ int q_rows(const ForwardArgs& args) const { return args.seqlen_q; }
  __device__ __forceinline__ int queries(const ForwardArgs& args) const { return args.seqlen_q; }
  __device__ __forceinline__ int keys(const ForwardArgs& args) const { return args.seqlen_k; }
  __device__ __forceinline__ int key_end(const ForwardArgs& args) const { return args.seqlen_k; }
  __device__ __forceinline__ int q_start() const { return 0; }
  __device__ __forceinline__ int k_start() const { return 0; }
  __device__ __forceinline__ int q_batch(const ForwardArgs&, int batch) const { return batch; }
  __device__ __forceinline__ int k_batch(const ForwardArgs&, int batch) const { return batch; }
};

template <>
struct Lengths<true> {
  int q_rows_, queries_;  // rows of q and out; those at or past queries_ see nothing
  int keys_, key_end_;    // row i stands at i + keys - queries; keys at or past key_end do not exist
  int q_start_, k_start_, k_batch_;

  static __device__ __forceinline__ int rows_of(const ForwardArgs& args, int b) {
    return args.cu_seqlens_q != nullptr ? args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b] : args.seqlen_q;
  }
  __device__ __forceinline__ void read(const ForwardArgs& args, int b) {
    q_rows_ = rows_of(args, b);
    queries_ = args.seqused_q != nullptr ? min(args.seqused_q[b], q_rows_) : q_rows_;
    q_start_ = args.cu_seqlens_q != nullptr ? args.cu_seqlens_q[b] : 0;
    k_start_ = 0;
    k_batch_ = b;
    if (args.has_cache) {
      const int before = args.cache_seqlens != nullptr ? args.cache_seqlens[b] : args.seqlen_k;
      keys_ = before + (args.appended < 0 ? q_rows_ : args.appended);
      key_end_ = min(keys_, args.seqlen_k);
      if (args.cache_batch_idx != nullptr) k_batch_ = args.cache_batch_idx[b];
      return;
    }
    keys_ = args.seqlen_k;
    if (args.cu_seqlens_k != nullptr) {
      k_start_ = args.cu_seqlens_k[b];
      k_batch_ = 0;
      keys_ = args.cu_seqlens_k[b + 1] - k_start_;
    }
    if (args.seqused_k != nullptr) keys_ = args.seqused_k[b];
    key_end_ = keys_;
  }
  __device__ __forceinline__ int q_rows(const ForwardArgs&) const { return q_rows_; }
  __device__ __forceinline__ int queries(const ForwardArgs&) const { return queries_; }
  __device__ __forceinline__ int keys(const ForwardArgs&) const { return keys_; }
  __device__ __forceinline__ int key_end(const ForwardArgs&) const { return key_end_; }
  __device__ __forceinline__ int q_start() const { return q_start_; }
  __device__ __forceinline__ int k_start() const { return k_start_; }
  __device__ __forceinline__ int q_batch(const ForwardArgs& args, int b) const {
    return args.cu_seqlens_q != nullptr ? 0 : b;
  }
  __device__ __forceinline__ int k_batch(const ForwardArgs&, int) const { return k_batch_; }
};

/// Rows [row_block * rows, ...) of one head, against the blocks of keys [first_block, last_block).
template <typename Traits>
struct Tile {
  int row_block, head, batch;
  int first_block, last_block;
  int number;  // of the walk's steps
  Lengths<Traits::ragged> lengths;

  __device__ __forceinline__ int first_row() const { return row_block * Traits::rows; }
  __device__ __forceinline__ bool empty() const { return first_block >= last_block; }
  __device__ __forceinline__ int shift(const ForwardArgs& args) const { return lengths.keys(args) - lengths.queries(args); }

  /// The keys [begin, end) that a row sees; end may be below begin.
  __device__ __forceinline__ void visible(const ForwardArgs& args, int row, int& begin, int& end) const {
    begin = 0;
    end = lengths.key_end(args);
    if constexpr (Traits::masked) {
      const int position = row + shift(args);
      if (args.window_right >= 0) end = min(end, position + args.window_right + 1);
      if (args.window_left >= 0) begin = max(begin, position - args.window_left);
    }
    if constexpr (Traits::ragged) {
      if (row >= lengths.queries(args)) end = 0;
    }
  }

  /// Blocks [whole_begin, whole_end) are seen whole by `count` rows from `row`.
  __device__ __forceinline__ int whole_end(const ForwardArgs& args, int row, int count) const {
    int end = lengths.key_end(args);
    if constexpr (Traits::masked) {
      if (args.window_right >= 0) end = min(end, max(row + shift(args) + args.window_right + 1, 0));
    }
    if constexpr (Traits::ragged) {
      const int queries = lengths.queries(args);
      if (queries < lengths.q_rows(args) && row + count > queries) end = 0;
    }
    return end / Traits::keys;
  }
  __device__ __forceinline__ int whole_begin(const ForwardArgs& args, int row, int count) const {
    if constexpr (Traits::masked) {
      if (args.window_left >= 0) {
        const int begin = max(row + count - 1 + shift(args) - args.window_left, 0);
        return (begin + Traits::keys - 1) / Traits::keys;
      }
    }
    return 0;
  }
  /// One past the last block that `row` sees, if it sees any.
  __device__ __forceinline__ int last_block_of(const ForwardArgs& args, int row) const {
    int end = lengths.key_end(args);
    if (args.window_right >= 0) end = min(end, max(row + shift(args) + args.window_right + 1, 0));
    return (end + Traits::keys - 1) / Traits::keys;
  }
};

/// The blocks [first, last) that the rows of one consumer see, from the last to the first, and take part in: one at least.
/// Blocks [whole_begin, whole_end) are seen whole. idle: there are no such rows.
struct alignas(8) TileRange {
  int first, last, whole_begin, whole_end;
  bool idle;

  TileRange() = default;
  template <typename Traits>
  __device__ __forceinline__ TileRange(const ForwardArgs& args, const Tile<Traits>& tile, int consumer) {
    const int row = tile.first_row() + consumer * 64;
    first = tile.first_block;
    last = tile.last_block;
    if constexpr (Traits::masked) last = max(min(last, tile.last_block_of(args, row + 63)), first + 1);
    whole_begin = tile.whole_begin(args, row, 64);
    whole_end = tile.whole_end(args, row, 64);
    idle = row >= tile.lengths.q_rows(args);
  }
};

/// Where a tile's rows and keys lie, in coordinates of the tensor maps.
struct TilePlace {
  int q_row, head, q_batch, k_start, head_kv, k_batch;

  TilePlace() = default;
  template <typename Traits>
  __device__ __forceinline__ TilePlace(const ForwardArgs& args, const Tile<Traits>& tile)
      : q_row(tile.lengths.q_start() + tile.first_row()),
        head(tile.head),
        q_batch(tile.lengths.q_batch(args, tile.batch)),
        k_start(tile.lengths.k_start()),
        head_kv(tile.head / args.group),
        k_batch(tile.lengths.k_batch(args, tile.batch)) {}

  /// Chunk c, of 64 columns.
  __device__ __forceinline__ void load_q(void* to, const CUtensorMap* map, uint64_t* barrier, int c) const {
    tma_load_4d(to, map, barrier, 64 * c, q_row, head, q_batch, kEvictFirst);
  }
  __device__ __forceinline__ void load_kv(void* to, const CUtensorMap* map, uint64_t* barrier, int c, int key) const {
    tma_load_4d(to, map, barrier, 64 * c, k_start + key, head_kv, k_batch, kEvictLast);
  }
};

template <typename Traits>
struct alignas(1024) ForwardSmem {
  using Element = typename Traits::element;
  Element q[Traits::q_stages][Traits::chunks][Traits::rows][64];
  Element k[Traits::stages][Traits::chunks][Traits::keys][64];
  Element v[Traits::stages][Traits::chunks][Traits::keys][64];
  Element o[Traits::stores_tma ? Traits::consumers : 1][Traits::stores_tma ? Traits::chunks : 1][Traits::stores_tma ? 64 : 1]
           [64];
  uint64_t q_full[Traits::q_stages], q_empty[Traits::q_stages];
  uint64_t k_full[Traits::stages], k_empty[Traits::stages];
  uint64_t v_full[Traits::stages], v_empty[Traits::stages];
  uint64_t redo_full;
  Tile<Traits> tiles[kTileRing];  // by number; written before q_full
  TileRange ranges[kTileRing][Traits::consumers];
  alignas(16) uint32_t bad_tiles[kBits / 32];  // by number, modulo kBits: whether outputs are not finite
  uint32_t bad_blocks[kBits / 32];  // of the tile that is done again, modulo kBits: whether elements were taken out of V
};

/// Walks through the tiles of this block, in an order that needs no communication between blocks. Full attention: tiles of
/// equal cost, neighbours share K and V. Masked: MaskedOrder; every other round runs backwards over the grid, so that a
/// block that got the longest tile of a round gets the shortest of the next. Ragged: sequence by sequence, each warp
/// counting their tiles. (TileOrder of tile_scheduler.cuh is for grids of one block a tile, where the hardware balances.)
template <typename Traits>
struct TileWalk {
  int step = 0;
  int passed = 0, passed_tiles = 0;  // ragged: batch entries before the 32 that hold the tile, and their tiles

  /// False after the last tile. All lanes of a warp call it. Tiles that see nothing are left out, unless kEmptyToo.
  template <bool kEmptyToo = false>
  __device__ __forceinline__ bool next(const ForwardArgs& args, Tile<Traits>& tile) {
    while (true) {
      const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
      const int index = step * grid + ((Traits::masked && (step & 1)) ? grid - 1 - block : block);
      tile.number = step++;
      if (!find(args, tile, index)) return false;
      tile.first_block = 0;
      if constexpr (!Traits::masked) {
        tile.last_block = (args.seqlen_k + Traits::keys - 1) / Traits::keys;
        return true;
      } else {
        const int first_row = tile.first_row(), queries = tile.lengths.queries(args);
        int begin, end, unused;
        tile.visible(args, first_row, begin, unused);
        tile.visible(args, min(first_row + Traits::rows, queries) - 1, unused, end);
        const bool any = begin < end && first_row < queries;
        tile.first_block = any ? begin / Traits::keys : 0;
        tile.last_block = any ? (end + Traits::keys - 1) / Traits::keys : 0;
        if (kEmptyToo || any) return true;
      }
    }
  }

 private:
  __device__ __forceinline__ bool find(const ForwardArgs& args, Tile<Traits>& tile, int index) {
    if constexpr (Traits::ragged) {
      const int lane = static_cast<int>(threadIdx.x) & 31;
      int count, before;
      while (true) {
        if (passed >= args.batch) return false;
        count = passed + lane < args.batch ? row_blocks(args, passed + lane) * args.heads : 0;
        before = count;  // inclusive sum over the lanes
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, before, i);
          if (lane >= i) before += other;
        }
        const int total = __shfl_sync(0xffffffffu, before, 31);
        if (index < passed_tiles + total) break;
        passed_tiles += total;
        passed += 32;
      }
      const int which = __popc(__ballot_sync(0xffffffffu, passed_tiles + before <= index));
      const int rest = index - passed_tiles - __shfl_sync(0xffffffffu, before - count, which);
      tile.batch = passed + which;
      const int blocks = row_blocks(args, tile.batch);
      tile.head = rest / blocks;
      tile.row_block = blocks - 1 - (rest - tile.head * blocks);  // the longest of a causal head first
      tile.lengths.read(args, tile.batch);
      return true;
    } else {
      if (index >= args.tiles) return false;  // only the last round is not full
      int pair;
      if constexpr (Traits::masked) {
        args.order.find(index, tile.row_block, pair);
      } else {
        pair = index / args.row_blocks;
        tile.row_block = index - pair * args.row_blocks;
      }
      tile.batch = pair / args.heads;
      tile.head = pair - tile.batch * args.heads;
      return true;
    }
  }
  static __device__ __forceinline__ int row_blocks(const ForwardArgs& args, int b) {
    return (Lengths<true>::rows_of(args, b) + Traits::rows - 1) / Traits::rows;
  }
};

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

}  // namespace vivace::sm90
