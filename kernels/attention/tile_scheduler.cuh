// In which order the blocks of a grid take the (query tile, head, batch entry) triples.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/mask.cuh"

namespace vivace {

/// One tile of queries of one head.
struct Tile {
  int m_block, head, batch;
};

/// A one-dimensional order, since grid.y and grid.z end at 65535. (batch, head) pairs are taken in groups whose keys and
/// values share the L2 cache; in a group the last query tiles come first: under a causal mask they are the longest, and the
/// short ones then fill the tail of the grid.
struct TileOrder {
  uint32_t m_blocks = 0;
  uint32_t heads = 0;
  uint32_t pairs = 0;  // batch * heads
  uint32_t group = 1;  // pairs that are scheduled together

  TileOrder() = default;

  /// rows: queries of a tile; l2_bytes: of the device's L2 cache.
  TileOrder(const AttentionParams& p, int rows, int64_t l2_bytes)
      : m_blocks(static_cast<uint32_t>((p.seqlen_q + rows - 1) / rows)),
        heads(static_cast<uint32_t>(p.heads)),
        pairs(static_cast<uint32_t>(p.batch * p.heads)) {
    const Window window(p);
    if (window.right == Window::kOpen || window.left != Window::kOpen) return;  // tiles of equal cost: a head at a time
    const int64_t kv_bytes = std::max<int64_t>(1, p.seqlen_k * (p.head_dim + p.head_dim_v) * size_of(p.dtype));
    const int64_t kv_heads = std::max<int64_t>(1, l2_bytes / 2 / kv_bytes);
    group = static_cast<uint32_t>(std::min<int64_t>(pairs, kv_heads * (p.heads / p.heads_kv)));
  }

  int64_t tiles() const { return static_cast<int64_t>(m_blocks) * pairs; }

  __device__ __forceinline__ Tile operator()(uint32_t index) const {
    const uint32_t g = index / (group * m_blocks);
    const uint32_t in_group = index - g * (group * m_blocks);
    const uint32_t size = min(group, pairs - g * group);  // the last group may be smaller
    const uint32_t m = in_group / size;
    const uint32_t pair = g * group + (in_group - m * size);
    return Tile{static_cast<int>(m_blocks - 1 - m), static_cast<int>(pair % heads), static_cast<int>(pair / heads)};
  }
};

}  // namespace vivace
