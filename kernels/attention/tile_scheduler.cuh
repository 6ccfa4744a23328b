// In which order the blocks of a grid take the (query tile, head, batch entry) triples.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/mask.cuh"
#include "kernels/common/fast_divmod.cuh"

namespace vivace {

/// One tile of queries of one head.
struct Tile {
  int m_block, head, batch;
};

/// A one-dimensional order, since grid.y and grid.z end at 65535. (batch, head) pairs are taken in groups whose keys and
/// values share the L2 cache; in a group the last query tiles come first: under a causal mask they are the longest, and the
/// short ones then fill the tail of the grid.
struct TileOrder {
  int m_blocks = 0;
  int pairs = 0;  // batch * heads
  int group = 1;  // pairs that are scheduled together; the last group may be smaller
  FastDivmod by_group_tiles, by_group, by_last_group, by_heads;

  TileOrder() = default;

  /// rows: queries of a tile; l2_bytes: of the device's L2 cache. Valid where tiles() < 2^31.
  TileOrder(const AttentionParams& p, int rows, int64_t l2_bytes)
      : m_blocks(static_cast<int>((p.seqlen_q + rows - 1) / rows)), pairs(static_cast<int>(p.batch * p.heads)) {
    const Window window(p);
    if (window.right != Window::kOpen && window.left == Window::kOpen) {  // else tiles of equal cost: a head at a time
      const int64_t kv_bytes = std::max<int64_t>(1, p.seqlen_k * (p.head_dim + p.head_dim_v) * size_of(p.dtype));
      const int64_t kv_heads = std::max<int64_t>(1, l2_bytes / 2 / kv_bytes);
      group = static_cast<int>(std::min<int64_t>(pairs, kv_heads * (p.heads / p.heads_kv)));
    }
    by_group_tiles = FastDivmod(static_cast<int64_t>(group) * m_blocks);
    by_group = FastDivmod(group);
    by_last_group = FastDivmod(pairs % group != 0 ? pairs % group : group);
    by_heads = FastDivmod(p.heads);
  }

  int64_t tiles() const { return static_cast<int64_t>(m_blocks) * pairs; }

  __device__ __forceinline__ Tile operator()(uint32_t index) const {
    int g, in_group, m, pair;
    by_group_tiles(static_cast<int>(index), g, in_group);
    if (pairs - g * group >= group) {
      by_group(in_group, m, pair);
    } else {
      by_last_group(in_group, m, pair);
    }
    Tile tile;
    tile.m_block = m_blocks - 1 - m;
    by_heads(pair + g * group, tile.batch, tile.head);
    return tile;
  }
};

}  // namespace vivace
