// In which order the persistent blocks of the sm90 forward kernel take the tiles of a masked dense call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VIVACE_ORDER_CALL __host__ __device__ __forceinline__
#else
#define VIVACE_ORDER_CALL inline
#endif

namespace vivace::sm90 {

/// The order of the tiles of a masked dense call: groups of (batch, head) pairs whose K and V share L2, and in a group by
/// row block, up and down in turns and down in the last, so that the cost of a tile changes little from one to the next and
/// ends small.
struct MaskedOrder {
  int row_blocks, pairs, group;  // pairs of a group

  VIVACE_ORDER_CALL int groups() const { return (pairs + group - 1) / group; }
  /// Pairs of group g: the last may have fewer.
  VIVACE_ORDER_CALL int size(int g) const { return group < pairs - g * group ? group : pairs - g * group; }
  /// The row block that comes `rank`-th in group g.
  VIVACE_ORDER_CALL int row_block(int g, int rank) const { return (groups() - 1 - g) & 1 ? rank : row_blocks - 1 - rank; }
  VIVACE_ORDER_CALL void find(int index, int& row, int& pair) const {
    const int tiles = group * row_blocks, g = index / tiles, rest = index - g * tiles, rank = rest / size(g);
    row = row_block(g, rank);
    pair = g * group + rest - rank * size(g);
  }
};

/// A masked dense call, as far as the cost of its tiles depends on it.
struct MaskedShape {
  int row_blocks, pairs, rows, keys;  // rows x keys: of a tile
  int seqlen_q, seqlen_k, window_left, window_right;
  int grid;
  int most;  // pairs whose K and V fit L2

  /// The keys that a row block sees, in blocks, and 0.7 of 128 for what every tile costs (fitted to measured times); 10 is
  /// 128 keys.
  int cost(int row_block) const {
    const int shift = seqlen_k - seqlen_q, first = row_block * rows, last = std::min(first + rows, seqlen_q) - 1;
    const int end = window_right < 0 ? seqlen_k : std::min<int64_t>(seqlen_k, int64_t{last} + shift + window_right + 1);
    const int begin = window_left < 0 ? 0 : std::max(first + shift - window_left, 0);
    return begin < end ? 10 * keys * ((end + keys - 1) / keys - begin / keys) / 128 + 7 : 1;
  }

  /// How evenly an order loads the grid, over its first tiles: mean / most.
  double balance(const MaskedOrder& order) const {
    constexpr int kMaxGrid = 1024, kSample = 4096;
    int64_t load[kMaxGrid] = {};
    const int blocks = std::min(grid, kMaxGrid);
    int64_t total = 0;
    int index = 0;
    for (int g = 0; g < order.groups() && index < kSample; ++g) {
      for (int rank = 0; rank < row_blocks && index < kSample; ++rank) {
        const int tile_cost = cost(order.row_block(g, rank));
        for (int i = order.size(g); i > 0; --i, ++index) {
          const int round = index / blocks, at = index - round * blocks;
          load[round & 1 ? blocks - 1 - at : at] += tile_cost;
          total += tile_cost;
        }
      }
    }
    return static_cast<double>(total) / blocks / static_cast<double>(*std::max_element(load, load + blocks));
  }

  /// Where the length of a group and that of a round resonate, the same blocks get the long tiles each time and the rest
  /// idles for a third of the call. So sizes are tried: the largest that is within 0.5 % of the best, and beyond L2 only
  /// what is 3 % better.
  MaskedOrder choose() const {
    MaskedOrder chosen{row_blocks, pairs, 1};
    double best = 0.0;
    for (int size = 1;; size = std::min(2 * size, size < most ? most : pairs)) {
      const int groups = (pairs + size - 1) / size;
      const MaskedOrder order{row_blocks, pairs, (pairs + groups - 1) / groups};  // of one size
      const double balanced = balance(order);
      if (balanced > (size <= most ? best - 0.005 : best + 0.03)) {
        chosen = order;
        best = std::max(best, balanced);
      }
      if (size >= pairs) return chosen;
    }
  }
};

/// choose(), remembered for the latest shapes of this thread: it costs some 10 us.
inline MaskedOrder masked_order(const MaskedShape& shape) {
  struct Known {
    MaskedShape shape;
    MaskedOrder order;
  };
  constexpr int kKnown = 16;
  thread_local Known known[kKnown] = {};
  thread_local int next = 0;
  for (const Known& k : known) {
    if (std::memcmp(&k.shape, &shape, sizeof(shape)) == 0) return k.order;
  }
  known[next] = Known{shape, shape.choose()};
  const MaskedOrder order = known[next].order;
  next = (next + 1) % kKnown;
  return order;
}

}  // namespace vivace::sm90

#undef VIVACE_ORDER_CALL
