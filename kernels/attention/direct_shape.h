// Which calls attention_decode_direct takes, and over how many CTAs. Plain C++,
// for csrc and the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/params.h"

namespace vivace {

/// Most query rows (seqlen_q * heads / heads_kv) that it takes, and most of its
/// narrower forms.
inline constexpr int64_t kDirectRows = 8, kDirectNarrowRows = 4, kDirectFewRows = 2;

/// Most new keys of a row that it appends itself.
inline constexpr int64_t kDirectAppended = 8;

/// Keys of a warp's tile: 8 KiB of keys and values.
constexpr int direct_keys(int64_t head_dim) { return head_dim == 64 ? 32 : 16; }

/// From so many bytes of cache on its form for many rows may run, which reads
/// them as from memory.
inline constexpr int64_t kDirectManyBytes = int64_t{64} << 20;

/// The grid is (heads_kv, parts, batch).
struct DirectShape {
  bool covered = false;
  int64_t warps = 0;           // of a CTA
  int64_t blocks = 0;          // CTAs that share a multiprocessor
  int64_t tile = 0;            // keys of a CTA
  int64_t parts = 0;           // that a row's keys are cut into, by its capacity
  int64_t piece = 0;           // under split_keys: keys of a part
  bool prefetch_next = false;  // a CTA asks L2 for the first tile of the one that takes its place
};

/// Every query sees every key of its row, and nothing changes a score. A probe
/// is a launch of its own, from lse. Whether pointers and strides fit is the
/// launcher's to say.
inline bool is_plain_decode(const AttentionParams& p) {
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  if (p.head_dim != p.head_dim_v || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (!p.has_cache || p.seqlen_k <= 0 || p.cu_seqlens_q != nullptr || p.seqused_q != nullptr) return false;
  if (p.cache_leftpad != nullptr || p.bias != nullptr) return false;
  if (p.softcap != 0.0f || p.alibi_slopes != nullptr || p.sinks != nullptr || p.dropout_p != 0.0f) return false;
  if (p.window_left >= 0 || (p.window_right >= 0 && p.seqlen_q > 1)) return false;
  return p.seqlen_q * (p.heads / std::max<int64_t>(p.heads_kv, 1)) <= kDirectRows;
}

inline DirectShape direct_shape(const AttentionParams& p) {
  DirectShape s;
  s.covered = is_plain_decode(p);
  if (!s.covered) return s;
  const int64_t units = p.batch * p.heads_kv, keys = direct_keys(p.head_dim);
  const int64_t rows = p.seqlen_q * (p.heads / p.heads_kv);
  const bool chosen = p.num_splits == 0 && p.split_keys == 0;  // else a row's bits may not depend on the batch
  const int64_t bytes = units * p.seqlen_k * (p.head_dim + p.head_dim_v) * 2;
  // Rows that are enough without parts, and much to read: places enough for
  // CTAs to take turns.
  const bool many = chosen && units > p.multiprocessors && bytes >= kDirectManyBytes;
  s.warps = 8;
  s.blocks = p.head_dim == 64 ? 2 : 1;
  // Short rows in pages: their ends are many, and all wait for a page's number
  // first.
  const bool short_pages = p.block_table != nullptr && p.seqlen_k <= 1024 && rows <= kDirectFewRows;
  if (p.head_dim == 64 && many && short_pages && units > 8 * p.multiprocessors) s.warps = s.blocks = 4;
  // head_dim 128: one CTA of 8 warps a multiprocessor, so that a row has few
  // parts. Of many rows, three of 4, whose ends cost less; or two of 6, where
  // they have much to read.
  if (p.head_dim == 128 && many) {
    const bool few = units <= 3 * p.multiprocessors;
    if (p.seqlen_k <= (few ? 1024 : 512)) {
      s.warps = 4;
      s.blocks = 3;
    } else if (!few) {
      s.warps = 6;
      s.blocks = 2;
    }
  }
  // Where little is under way on a multiprocessor, or ends are many.
  s.prefetch_next = p.head_dim == 128 ? s.warps == 8 || p.seqlen_k <= 1024 : s.warps == 4;
  s.tile = s.warps * keys;
  const int64_t tiles = (p.seqlen_k + s.tile - 1) / s.tile;
  if (p.num_splits > 0) {
    s.parts = std::min(p.num_splits, tiles);
  } else if (p.split_keys > 0) {
    s.piece = (p.split_keys + keys - 1) / keys * keys;
    s.parts = (p.seqlen_k + s.piece - 1) / s.piece;
  } else {
    // A CTA for every place, as far as there are tiles. Where there are more,
    // none that takes long: the last ones are waited for. But starting a CTA
    // costs as well.
    const int64_t places = s.blocks * p.multiprocessors;
    const int64_t most = s.warps == 6                                                            ? 4096
                         : p.head_dim == 64 && (p.block_table != nullptr || units <= 4 * places) ? 1024
                                                                                                 : 2048;
    s.parts = units > places ? (p.seqlen_k + most - 1) / most : places / std::max<int64_t>(units, 1);
    s.parts = std::clamp<int64_t>(s.parts, 1, tiles);
  }
  return s;
}

/// Bytes of packets, see decode_direct.cuh: 16 for each pair of outputs and
/// each row of each part but the merging one.
inline int64_t direct_packet_bytes(const AttentionParams& p, const DirectShape& s) {
  if (s.parts <= 1) return 0;
  const int64_t rows = p.seqlen_q * (p.heads / p.heads_kv);
  return p.batch * s.parts * p.heads_kv * rows * (p.head_dim_v / 2 + 1) * 16;
}

}  // namespace vivace
