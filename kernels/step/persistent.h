// Sizes, shared memory and mailboxes of the persistent token step; see persistent.cuh for how they are used.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "kernels/step/step.h"

namespace vivace::step {

/// A model of `kHeads` heads of 64, hidden = 64 * heads, intermediate = 4 * hidden, and at most `kRows` rows.
template <int kHeads, int kRows>
struct PersistentShape {
  static constexpr int heads = kHeads, rows = kRows;
  static constexpr int head_dim = 64;
  static constexpr int hidden = head_dim * heads;
  static constexpr int intermediate = 4 * hidden;
  static constexpr int group = 8;                   // CTAs of one head
  static constexpr int ctas = group * heads;        // each owns 8 of the hidden outputs and 32 of the intermediate ones
  static constexpr int warps = heads / 2;           // consumers: 128 inputs each (512 of down's), two heads
  static constexpr int threads = 32 * warps + 128;  // the producer is alone in a warpgroup, whose registers the others take
  static constexpr int consumer_registers = 208;    // 2 warps of 208 and one of 88 in each quarter of the SM: 3 of 168
  static constexpr int producer_registers = 88;

  // Stages that the copy engine may have under way. More only delay the packets, unless they are asked for at a pace: that
  // of memory, or with more rows, whose layers take longer, one that is a little quicker than the layers are.
  static constexpr int in_flight_unpaced = 2, in_flight = 4;
  static constexpr float pace = rows == 1 ? 0.955f : rows == 2 ? 0.9f : 0.83f;  // of what memory's clock and width make
  static constexpr int stage_bytes = 8 * hidden * 2;  // 8 rows of weights, or `chunk` keys and values
  static constexpr int chunk = 8 * warps;             // keys of a stage
  static constexpr int chunk_groups = chunk / 16;     // of 16 keys, which a warp takes at a time

  // A row's keys are split into 2, 4 or 8 parts by their number.
  static constexpr int group_log2 = 3;
  static constexpr int batch_log2 = 1;
  static constexpr int batch = 1 << batch_log2;  // the least number of parts; so many are merged at a time
  static constexpr int few_keys = 64 * warps;    // up to this many in 2 parts, up to twice as many in 4
  static constexpr int slots = warps + 1;        // partial results of attention: a warp's, and the new key's
  static constexpr int slot_floats = head_dim + 2;

  // Of the head, in a round of a CTA; T3's vocabulary has a tile more than eight for each.
  static constexpr int head_tiles = 10;

  // Pairs of gate/up's tiles, two stages each, fetched before the projection's inputs are there. More keep the stream
  // running while CTAs exchange results, which then takes longer.
  static constexpr int early_pairs = rows <= 2 ? 2 : 1;

  static constexpr int passes = rows <= 2 ? 1 : 2;          // in which down's inputs are staged
  static constexpr int gated_words = 256 / passes;          // a row and pass; two bf16 a word
  static constexpr int staging_words = gated_words * rows;  // a warp

  // Sums over warps alternate between three buffers; the last float of a row of a and b is the sum of squares.
  static constexpr int row_a = 26, row_b = 68, row_c = 8;
  static constexpr int sums_a = warps * rows * row_a;                                // QKV, output projection
  static constexpr int sums_b = std::max(slots * slot_floats, warps* row_b) * rows;  // attention, gate/up, head
  static constexpr int sums_c = warps * rows * row_c;                                // down
  static constexpr int probe_lse = StepParams::kMaxProbes * rows;
  static constexpr int fixed_bytes = 16 + 4 * (warps * staging_words + sums_b + sums_a + sums_c + probe_lse + 16 * rows);
  static constexpr int max_shared = 232448;
  static constexpr int stages = std::min(16, (max_shared - fixed_bytes) / (stage_bytes + 16));
  static constexpr int shared_bytes = stages * (stage_bytes + 16) + fixed_bytes;
  static_assert(stages >= head_tiles && rows <= 4);
};

/// Mailboxes in the workspace, by offset in bytes; sized for all rows, so that they do not depend on `rows`.
template <int kHeads>
struct Mailboxes {
  static constexpr int kMaxRows = 4;
  using Shape = PersistentShape<kHeads, 1>;
  static constexpr int x_packets = 2;      // a CTA and row: 8 inputs of the next product, their sum of squares
  static constexpr int part_packets = 11;  // a CTA and row: 64 outputs of attention over its keys, log-sum-exp
  static constexpr int gated_packets = 6;  // a CTA and row: 32 intermediate values
  static constexpr size_t row_packets = size_t{16} * Shape::ctas * kMaxRows;
  static constexpr size_t counter = 0;
  static constexpr size_t clock = 128;                                             // cycles a microsecond
  static constexpr size_t heads_qkv = 256;                                         // uint2 (heads, rows, q|k|v, 32)
  static constexpr size_t parts = heads_qkv + size_t{8} * kHeads * kMaxRows * 96;  // uint4 (rows, ctas, 11)
  static constexpr size_t x_out = parts + row_packets * part_packets;              // uint4 (rows, ctas, 2)
  static constexpr size_t x_down = x_out + row_packets * x_packets;                // uint4 (rows, ctas, 2)
  static constexpr size_t gated = x_down + row_packets * x_packets;                // uint4 (rows, ctas, 6)
  static constexpr size_t bytes = gated + row_packets * gated_packets;
};

/// Kernel argument. The maps read boxes of 64 inputs x 8 outputs x `heads` groups of 64 inputs, but for `out`; a stage each,
/// swizzled by 128 bytes.
struct PersistentArgs {
  CUtensorMap qkv;  // 64 inputs, 32 outputs, half of a head, input group, head of q|k|v of a layer
  CUtensorMap out;  // 64 inputs, outputs of all layers, input group; and likewise:
  CUtensorMap gate_up;
  CUtensorMap down;
  CUtensorMap head;
  CUtensorMap k[2];  // 64 of a head, `chunk` or 8 positions, head, cache row, layer
  CUtensorMap v[2];
  StepParams p;
  float stage_ns;  // from stage to stage at least; 0: not known
  uint32_t zero;   // 0, but the compiler does not know
};

}  // namespace vivace::step
