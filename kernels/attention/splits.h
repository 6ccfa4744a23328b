// How many CTAs share the keys of one unit of attention_decode. Plain C++, for csrc.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vivace {

/// Keys in one block of attention_decode: 8 KiB of K and 8 KiB of V, whatever the head size. `element_size` in bytes.
constexpr int64_t decode_block(int64_t head_dim, int64_t element_size) {
  const int64_t padded = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
  return 8192 / (padded * element_size);
}

/// Query rows (seqlen_q * heads / heads_kv) that one CTA of attention_decode takes: the work units of a call are
/// batch * heads_kv * ceil(rows / decode_rows(rows)). (Heads above 128 and elements of 4 bytes stop at 4; rare enough.)
constexpr int64_t decode_rows(int64_t rows) { return rows <= 1 ? 1 : rows <= 4 ? 4 : 8; }

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
