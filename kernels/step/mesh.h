// Shapes, workspace and arguments of the mesh token step.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/step/step.h"

namespace vivace::mesh {

/// Rows of a launch: the M of wgmma.
inline constexpr int kMaxRows = 64;

/// The model: 16 heads of 64. A mesh of CTAs: 16 groups, each of a head and of 256 intermediates, times 8 blocks of 128
/// columns of hidden.
inline constexpr int kHeads = 16, kDim = 64, kHidden = kHeads * kDim, kIntermediate = 4 * kHidden;
inline constexpr int kGroups = kHeads, kBlocks = 8, kCtas = kGroups * kBlocks;
inline constexpr int kColumns = kHidden / kBlocks;       // 128, of a block
inline constexpr int kMiddle = kIntermediate / kGroups;  // 256 intermediates of a group
inline constexpr int kShare = kMiddle / kBlocks;         // 32 of a CTA
inline constexpr int kFresh = 3 * kDim;                  // q, k and v of a row and a head

/// Two warpgroups that multiply and attend, and one of which a thread streams; registers of their threads.
inline constexpr int kWarps = 8, kConsumers = 32 * kWarps, kThreads = kConsumers + 128;
inline constexpr int kConsumerRegisters = 224, kStreamRegisters = 56;
/// Threads beside the warp that streams, for what nobody waits for.
inline constexpr int kBeside = kThreads - kConsumers - 32;
/// The ring of weights, keys and values.
inline constexpr int kStages = 12, kStageBytes = 16 * 1024;
/// Stages that may be under way: as a rule; if the CTA has more than so many stages of keys, while it waits for x before q,
/// k and v, from attention on until `out` is sent, and while `down` is multiplied; from x before q, k and v on, and while
/// gate_up multiplies; in attention. There a warp waits for every 8th stage alone. What its slot held before must have
/// landed by then, or the parity would mislead: copies overtake each other, but not by more than the ring has beyond
/// those 8.
inline constexpr int kUnderWay = 1, kSomeUnderWay = 2, kManyStages = 8, kMoreUnderWay = 3, kMostUnderWay = 4;
static_assert(kMostUnderWay <= kStages - kWarps);
/// Rows that a CTA attends at most.
inline constexpr int kUnits = kMaxRows / kBlocks;

/// Byte offsets in the workspace. Zero before the first launch, and by every launch left as the next one needs it (see
/// mesh_vector.cuh). A row's place does not depend on how many there are. Within x, squares, gated and attention see
/// place_of.
struct Layout {
  static constexpr size_t sums = 0;  // (blocks, rows, groups, 128): partial sums of `out` and `down`
  static constexpr size_t fresh = sums + size_t{2} * kBlocks * kMaxRows * kGroups * kColumns;  // (groups, rows, blocks, 192)
  static constexpr size_t x = fresh + size_t{2} * kGroups * kMaxRows * kBlocks * kFresh;  // (rows, hidden): residual * gain
  // before the head x and squares have places of their own, so far behind those of the layers
  static constexpr size_t head_x = size_t{2} * kMaxRows * kHidden, head_squares = size_t{4} * kMaxRows * 2 * kBlocks;
  static constexpr size_t squares = x + 2 * head_x;                                      // (rows, 16) fp32
  static constexpr size_t gated = squares + 2 * head_squares;                            // (groups, rows, 256)
  static constexpr size_t attention = gated + size_t{2} * kGroups * kMaxRows * kMiddle;  // (groups, rows, 64)
  static constexpr size_t bytes = attention + size_t{2} * kGroups * kMaxRows * kDim;
};

struct Args {
  StepParams p;
  CUtensorMap qkv, out, gate_up, down, head;  // see mesh.cu
  CUtensorMap keys[8], values[8];             // boxes of 8 (i + 1) positions of a head
};

}  // namespace vivace::mesh
