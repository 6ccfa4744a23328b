// Shapes, workspace and arguments of the split token step.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/step/step.h"

namespace vivace::split {

/// Rows of one launch, which are two halves; more take further launches.
inline constexpr int kHalf = 64, kMaxRows = 2 * kHalf;
/// A stage of the rings of weights, and of keys and values.
inline constexpr int kStageBytes = 16 * 1024;

/// A model of kHeads heads of 64, hidden 64 * kHeads, intermediate 4 * hidden.
template <int kHeads>
struct Shape {
  static constexpr int heads = kHeads, hidden = 64 * heads, intermediate = 4 * hidden;
  static constexpr int products = 4 * heads;       // CTAs that multiply: 4 a head
  static constexpr int workers = 2 * products;     // warpgroups that multiply: 8 a head
  static constexpr int blocks = hidden / 64;       // blocks of 64 columns of hidden, and of a quarter of intermediate
  static constexpr int slices = 4;                 // of the columns of `down`
  static constexpr int threads = 384;              // two warpgroups, and one for the loading threads
  static constexpr int registers = 224;            // of a thread of those two; 3 x 168 are what 384 threads can have
  static constexpr int loader_registers = 56;      // of the third
  static constexpr int block_bytes = kHalf * 128;  // of activations
  static constexpr int group = 4, groups = 3;      // blocks of activations that are loaded together, of a ring
  static constexpr int x_bytes = groups * group * block_bytes;
  static constexpr int stages = 8, attention_stages = 6;  // of the ring of weights, and of keys and values of a warpgroup
  static constexpr int out_blocks = blocks < 8 ? blocks : 8;  // of the matrix `out`, in a stage
};

/// Counters, a line each: how often something has happened since the workspace was zeroed. They may wrap, and
/// so may what they are compared with: only differences count.
struct Counters {
  static constexpr int launches = 0;  // of the kernel
  static constexpr int x = 1;         // (2 halves) warpgroups that have written their part of x
  static constexpr int attended = 3;  // (2) warpgroups that have finished attention
  static constexpr int queries = 5;   // (2) warpgroups that have written their part of q, k, v
  static constexpr int gated = 8;     // (2, 4 slices) warpgroups that have written their part of silu(gate) * up
  static constexpr int down = 16;     // (2, 32) slices that have written their sums of half a tile of `down`
  static constexpr int count = 80, stride = 32;
};

/// Byte offsets in the workspace: of a half, and of what is behind the halves.
template <int kHeads>
struct Layout {
  static constexpr size_t hidden = 64 * kHeads, workers = 8 * kHeads;
  static constexpr size_t x = 0;                                   // (64, hidden): residual * gain
  static constexpr size_t squares = x + kHalf * hidden * 2;        // (64, workers) fp32
  static constexpr size_t q = squares + kHalf * workers * 4;       // (64, hidden), rotated
  static constexpr size_t attention = q + kHalf * hidden * 2;      // (64, hidden)
  static constexpr size_t gated = attention + kHalf * hidden * 2;  // (64, intermediate)
  static constexpr size_t sums = gated + kHalf * hidden * 8;       // (workers, 4 slices, 64, 8) fp32: by owner
  static constexpr size_t half = sums + workers * 4 * kHalf * 8 * 4;
  static constexpr size_t counters = 2 * half, bytes = counters + Counters::count * Counters::stride * 4;
};

struct Args {
  StepParams p;
  // Matrices in blocks of 64 columns, and activations of both halves.
  CUtensorMap qkv, out, gate_up, down, head, x[2], attention[2], gated[2];
  int32_t attentions = 0;  // CTAs that attend
};

}  // namespace vivace::split
