// What the roles of the sm90 forward kernel share: its variants, shared memory, arguments, and the walk through the tiles.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/tma.cuh"

namespace vivace::sm90 {

/// kMasked: causal or window, the keys that a tile sees depend on its rows. kRagged: lengths come from device memory
/// (variable length, or a cache); a ragged kernel is a masked one.
template <typename Element, int kHeadDim, int kKeys, int kConsumers, int kStages, bool kMasked, bool kRagged>
struct ForwardTraits {
  static_assert(kMasked || !kRagged);
  using element = Element;
  static constexpr int head_dim = kHeadDim;
  static constexpr int keys = kKeys;
  static constexpr int consumers = kConsumers;
  static constexpr int stages = kStages;
  static constexpr bool masked = kMasked;
  static constexpr bool ragged = kRagged;
  static constexpr int rows = 64 * kConsumers;
  static constexpr int threads = 128 * (kConsumers + 1);
  static constexpr int chunks = (kHeadDim + 63) / 64;  // of 64 elements, the width of a swizzled row
  // Above 128 columns shared memory has no room for the next tile's Q, nor for an output tile on its way to TMA.
  static constexpr int q_stages = kHeadDim <= 128 ? 2 : 1;
  static constexpr bool stores_tma = kHeadDim <= 128;
  static constexpr bool turns = kHeadDim <= 128;  // consumers take turns at the tensor cores
  // The sum over the block is what it was launched with: 512 x 128, or 384 x 168.
  // Their sum over the block is at most what it was launched with, 512 x 128 or 384 x 168: setmaxnreg would wait for ever.
  static constexpr int producer_registers = kConsumers == 3 ? 32 : kRagged ? 40 : 24;
  static constexpr int consumer_registers = kConsumers == 3 ? 160 : kRagged ? 232 : 240;
};

inline constexpr int kRemovedRing = 8;  // tiles; more than the inspectors can be ahead of a consumer

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
  uint64_t v_raw[Traits::stages];  // V of an inspected block, by its number among those: v_full follows the inspection
  uint32_t removed[kRemovedRing];  // by tile: whether elements were taken out of V
};

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
      seqlen_k;         // dense: of every batch entry; ragged: where no array below says otherwise; capacity of a cache
  int32_t row_blocks;   // dense: ceil(seqlen_q / rows)
  int32_t tiles;        // row_blocks * batch * heads; ragged: an upper bound
  int32_t heads_in_l2;  // (batch, head) pairs whose K and V share L2: scheduled together
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
  /// Whether some row does not see some key of a block: its V is inspected before it is used.
  __device__ __forceinline__ bool inspected(const ForwardArgs& args, int block) const {
    return Traits::masked &&
           (block >= whole_end(args, first_row(), Traits::rows) || block < whole_begin(args, first_row(), Traits::rows));
  }
  __device__ __forceinline__ bool any_inspected(const ForwardArgs& args) const {
    return inspected(args, last_block - 1) || inspected(args, first_block);
  }
  /// One past the last block that `row` sees, if it sees any.
  __device__ __forceinline__ int last_block_of(const ForwardArgs& args, int row) const {
    int end = lengths.key_end(args);
    if (args.window_right >= 0) end = min(end, max(row + shift(args) + args.window_right + 1, 0));
    return (end + Traits::keys - 1) / Traits::keys;
  }
};

/// Walks through the tiles of this block, in an order that needs no communication between blocks. Full attention: tiles of
/// equal cost, neighbours share K and V. Masked: groups of heads whose K and V fit L2, and in a group by row block, up and
/// down in turns and down in the last, so that the cost of a tile changes little from one to the next and ends small; every
/// other round runs backwards over the grid, so that a block that got the longest tile of a round gets the shortest of the
/// next. Ragged: sequence by sequence, each warp counting their tiles. (TileOrder of tile_scheduler.cuh is for grids of one
/// block a tile, where the hardware balances.)
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
      ++step;
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
