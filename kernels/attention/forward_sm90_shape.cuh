// How the work of the sm90 forward kernels is cut: tiles of a head dimension, and which one a call takes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vivace::sm90 {

struct TileShape {
  int consumers;    // warpgroups of 64 queries each
  int keys;         // of a block
  int stages;       // blocks of K, and of V, in shared memory
  int q_stages;     // with two, the next tile's Q arrives while this one's is used
  bool turns;       // consumers take turns at the tensor cores
  bool stores_tma;  // the output leaves through shared memory, else from registers
};

// A call's results must not depend on what else is in its batch, to the bit. Shapes with the same keys compute a row alike,
// so consumers may be chosen by the size of the batch; keys only by the lengths of the sequences.

/// head_dim to 64.
template <bool kMasked>
constexpr TileShape shape_64(int consumers) {
  return {consumers, 64, 6, 2, !kMasked && consumers > 2, true};
}
inline constexpr TileShape kLong64{3, 128, 3, 2, true, true};  // full attention over many keys
inline constexpr TileShape kRagged64{3, 64, 6, 2, false, true};

/// head_dim to 96 and to 128: short for lengths that tiles of 192 rows do not fit.
inline constexpr TileShape kShort128{2, 128, 2, 2, true, true};
inline constexpr TileShape kLong96{3, 64, 4, 1, false, true};
template <bool kMasked>
inline constexpr TileShape kLong128 = kMasked ? TileShape{3, 64, 4, 1, true, true} : TileShape{3, 64, 4, 2, true, false};
inline constexpr TileShape kRagged128{3, 64, 4, 2, false, false};

template <bool kMasked>
inline constexpr TileShape k192{2, 64, 2, 2, !kMasked, false};
inline constexpr TileShape k256{2, 64, 2, 1, false, false};

/// How many consumers share the keys of a tile at head_dim 64. More of them use the tensor cores better, fewer make more
/// tiles: what takes the fewest rounds of the grid, times how long a block of keys takes (measured). `pairs`: batch * heads;
/// the tiles of a causal call are half as long as the longest, on average.
inline int consumers_64(int64_t rows, int64_t pairs, bool causal, int multiprocessors) {
  constexpr double kBlockTime[] = {0.0, 0.49, 0.68, 0.78, 1.0};
  int best = 4;
  double least = 0.0;
  for (int consumers = 4; consumers >= 1; --consumers) {
    const int64_t tiles = (rows + 64 * consumers - 1) / (64 * consumers) * pairs;
    const double rounds = causal ? std::max(1.0, 0.5 * static_cast<double>(tiles) / multiprocessors)
                                 : static_cast<double>((tiles + multiprocessors - 1) / multiprocessors);
    const double time = rounds * kBlockTime[consumers];
    if (consumers == 4 || time < 0.97 * least) {
      best = consumers;
      least = time;
    }
  }
  return best;
}

/// Whether full attention at head_dim 64 takes kLong64.
inline bool long_64(int64_t keys) { return keys > 4096; }

/// Whether head_dim 96 and 128 take their long shape: some 5 % faster a row, but its tiles have 192 rows.
inline bool long_128(int64_t rows) {
  const int64_t padded_long = (rows + 191) / 192 * 192, padded_short = (rows + 127) / 128 * 128;
  return 20 * padded_long <= 21 * padded_short;
}

}  // namespace vivace::sm90
