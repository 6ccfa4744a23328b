// Shapes, workspace and arguments of the split token step.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/step/step.h"

namespace vivace::split {

/// Rows of a part, of which one launch has two to four; more take further launches.
inline constexpr int kPartRows = 64, kMaxParts = 4, kMaxRows = kMaxParts * kPartRows;
/// A stage of the rings of weights, and of keys and values.
inline constexpr int kStageBytes = 16 * 1024;

/// A model of kHeads heads of 64, hidden 64 * kHeads, intermediate 4 * hidden.
template <int kHeads, int kParts>
struct Shape {
  static constexpr int heads = kHeads, parts = kParts, hidden = 64 * heads, intermediate = 4 * hidden;
  static constexpr int products = 4 * heads;           // CTAs that multiply: 4 a head
  static constexpr int workers = 2 * products;         // warpgroups that multiply: 8 a head
  static constexpr int blocks = hidden / 64;           // blocks of 64 columns of hidden, and of a quarter of intermediate
  static constexpr int slices = 4;                     // of the columns of `down`
  static constexpr int threads = 384;                  // two warpgroups, and one for the loading threads
  static constexpr int registers = 224;                // of a thread of those two; 3 x 168 are what 384 threads can have
  static constexpr int loader_registers = 56;          // of the third
  static constexpr int block_bytes = kPartRows * 128;  // of activations
  static constexpr int group = blocks < 8 ? 1 : 4, groups = 3;  // blocks of activations that are loaded together, of a ring
  static constexpr int head_groups = blocks / group;            // a block of attention is a head
  static constexpr int x_bytes = groups * group * block_bytes;
  static constexpr int stages = 8, attention_stages = 6;  // of the ring of weights, and of keys and values of a warpgroup
  static constexpr int tile = 128;                        // features of the head that a CTA takes at a time
  static constexpr int out_blocks = blocks < 8 ? blocks : 8;  // of the matrix `out`, in a stage
};

/// Counters, a line each: how often something has happened since the workspace was zeroed. They may wrap, and
/// so may what they are compared with: only differences count.
struct Counters {
  static constexpr int launches = 0;                      // (4 parts) of the kernel, with the part
  static constexpr int x = launches + kMaxParts;          // (4) warpgroups that have written their part of x
  static constexpr int attended = x + kMaxParts;          // (4, 4 groups of heads) warpgroups that have finished attention
  static constexpr int gated = attended + 4 * kMaxParts;  // (4, 4 slices) warpgroups that have written their silu(gate) * up
  // (4, 32) slices that have written their sums of half a tile of `down`, or will have soon: a hint when to look for them
  static constexpr int down = gated + 4 * kMaxParts;
  static constexpr int count = down + 32 * kMaxParts, stride = 32;
};

/// Byte offsets in the workspace: of a part, and of what is behind the parts. The words of `fresh` and `sums` are their own
/// flags, and 0 is the word that is not there: those of `fresh` are written inverted, of the sums a 0 is written as -0.
template <int kHeads>
struct Layout {
  static constexpr size_t hidden = 64 * kHeads, workers = 8 * kHeads;
  // x and gated are (columns / 8, 64, 8): what a warp stores at once, 8 rows of 8 columns, is a line.
  static constexpr size_t x = 0;                                           // residual * gain
  static constexpr size_t squares = x + kPartRows * hidden * 2;            // (64, workers) fp32
  static constexpr size_t fresh = squares + kPartRows * workers * 4;       // (2 by layer, 64, heads, 3, 64): q rotated, k, v
  static constexpr size_t attention = fresh + 2 * kPartRows * hidden * 6;  // (64, hidden)
  static constexpr size_t gated = attention + kPartRows * hidden * 2;      // silu(gate) * up
  static constexpr size_t sums = gated + kPartRows * hidden * 8;           // (workers, 4 slices, 64, 8) fp32: by owner
  static constexpr size_t part = sums + workers * 4 * kPartRows * 8 * 4;
  static constexpr size_t counters = kMaxParts * part;
  // (slots: a part in a layer) units that have been dealt to who asked, a line each
  static constexpr size_t asked = counters + Counters::count * Counters::stride * 4;
  static constexpr size_t bytes(int64_t layers) { return asked + layers * kMaxParts * Counters::stride * 4; }
};

struct Args {
  StepParams p;
  // Matrices in blocks of 64 columns, and activations of all parts.
  CUtensorMap qkv, out, gate_up, down, head, attention[kMaxParts];
  int32_t attentions = 0;  // CTAs that may attend
  int32_t signals = 0;     // what `attended` counts of a group of heads in a slot of any launch: their warpgroups
};

}  // namespace vivace::split
