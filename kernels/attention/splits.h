// How attention_decode cuts a call into work for its CTAs. Plain C++, for csrc and the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention/direct_shape.h"
#include "kernels/attention/params.h"

namespace vivace {

/// CTAs of attention_decode that shall share a multiprocessor.
constexpr int64_t kDecodeCtasPerSm = 2;

/// head_dim and head_dim_v padded to what the kernels are compiled for.
constexpr int64_t decode_head_dim(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

/// Keys that a warp takes at a time: 8 KiB of keys and values, 16 at head_dim 256.
constexpr int64_t decode_keys(int64_t head_dim) { return head_dim == 64 ? 32 : 16; }

/// Most query rows (seqlen_q * heads / heads_kv) of one CTA, bound by registers.
constexpr int64_t decode_max_rows(int64_t head_dim) { return head_dim == 256 ? 8 : 16; }

/// The grid of attention_decode: ranges * units CTAs. Nothing here depends on lengths, so a captured launch serves all.
struct DecodeShape {
  int64_t head_dim = 0;      // padded
  int64_t column_tiles = 0;  // of 8 query rows, of a CTA: 1 or 2
  int64_t rows = 0;          // query rows of a CTA, at most 8 * column_tiles
  int64_t row_tiles = 0;     // CTAs' shares of the query rows of a kv head
  int64_t units = 0;         // heads_kv * row_tiles: what reads a batch entry's keys once
  int64_t ranges = 0;        // that the keys of all batch entries, one after another, are cut into
  int64_t parts = 0;         // partial results that may exist at a time
};

inline DecodeShape decode_shape(const AttentionParams& p) {
  DecodeShape s;
  s.head_dim = decode_head_dim(std::max(p.head_dim, p.head_dim_v));
  const int64_t rows = std::max<int64_t>(p.seqlen_q, 1) * (p.heads / std::max<int64_t>(p.heads_kv, 1));
  const int64_t most = std::min(rows, decode_max_rows(s.head_dim));
  s.column_tiles = most <= 8 ? 1 : 2;
  s.rows = most;
  s.row_tiles = (rows + most - 1) / most;
  s.units = p.heads_kv * s.row_tiles;
  s.ranges = std::max<int64_t>(1, kDecodeCtasPerSm * p.multiprocessors / std::max<int64_t>(s.units, 1));
  if (p.num_splits == 1) {
    s.parts = 0;  // nothing is split
  } else if (p.num_splits > 1) {
    s.parts = p.batch * p.num_splits * s.units;
  } else if (p.split_keys > 0) {
    s.parts = p.batch * ((p.seqlen_k + p.split_keys - 1) / p.split_keys + 1) * s.units;
  } else {
    s.parts = 2 * s.ranges * s.units;  // a range's first and last batch entry
  }
  return s;
}

/// Bytes of partial results: 16 for each of (parts, rows, head_dim_v / 2 + 1), see decode_merge.cuh. Of whichever kernel
/// runs.
inline int64_t decode_packet_bytes(const AttentionParams& p) {
  const DecodeShape s = decode_shape(p);
  return std::max(s.parts * s.rows * (p.head_dim_v / 2 + 1) * 16, direct_packet_bytes(p, direct_shape(p)));
}

// ---- attention_decode_fp32, which splits the keys into a number of parts that the host chooses ----

/// Keys in one of its blocks: 8 KiB of K and 8 KiB of V.
constexpr int64_t fp32_decode_block(int64_t head_dim) { return head_dim <= 64 ? 32 : 16; }

/// Query rows that one of its CTAs takes.
constexpr int64_t fp32_decode_rows(int64_t rows) { return rows <= 1 ? 1 : 4; }

/// The number of splits of the keys that takes least time by the model below; the smallest where several tie.
///
/// work_units      CTAs of an unsplit launch
/// max_keys        the longest row; what the host knows of it is often the capacity of the cache
/// multiprocessors of the device
/// block           keys in a block, decode_block()
///
/// Time in units of what one CTA, alone on its multiprocessor, needs for a block (its copies in flight over the latency
/// of memory, about 0.25 us on Hopper). A launch takes the longer of
///  - ceil(CTAs / multiprocessors) * blocks of a split: the multiprocessor with most work, and
///  - kSaturation * blocks in all / multiprocessors: memory's own rate, which a CTA on every multiprocessor exceeds
///    about twice over (H200: 4.6 TB/s over 132 multiprocessors is 0.47 us a block), so an imbalance up to that is free.
/// Splitting costs the second launch and the reading of the partial results: 2 us, plus a little for each split.
inline int64_t choose_num_splits(int64_t work_units, int64_t max_keys, int64_t multiprocessors, int64_t block) {
  constexpr int64_t kMaxSplits = 128;
  constexpr double kSaturation = 2.0, kCombine = 8.0, kCombinePerSplit = 0.125;
  if (work_units <= 0 || max_keys <= 0 || multiprocessors <= 0 || block <= 0) return 1;
  const int64_t blocks = (max_keys + block - 1) / block;
  const double memory =
      kSaturation * static_cast<double>(work_units) * static_cast<double>(blocks) / static_cast<double>(multiprocessors);
  int64_t best = 1;
  double best_cost = 0.0;
  for (int64_t splits = 1; splits <= std::min(kMaxSplits, blocks); ++splits) {
    const int64_t waves = (work_units * splits + multiprocessors - 1) / multiprocessors;
    double cost = std::max(static_cast<double>(waves * ((blocks + splits - 1) / splits)), memory);
    if (splits > 1) cost += kCombine + kCombinePerSplit * static_cast<double>(splits);
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace vivace
