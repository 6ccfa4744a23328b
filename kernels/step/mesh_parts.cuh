// What the roles of the mesh step share: the ring, the place of a CTA, shared memory.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/step/mesh.h"
#include "kernels/step/mesh_ptx.cuh"
#include "kernels/step/step_ptx.cuh"

namespace vivace::mesh {

/// Named barriers, beside 0 of __syncthreads.
enum Barrier {
  kPair = 1,   // and 2, 3, 4: a warp of either warpgroup, the same rows (64 threads)
  kReady = 5,  // q, k and v of the CTA's rows are in shared memory (256)
  kMerge = 6,  // all parts of attention's states are in shared memory (256)
  kUsed = 7,   // which may be written again, as may q, k and v (256)
  kLast = 8    // x before the head comes next (256, which do not wait, and 96)
};

/// A row whose attention of the group's head the CTA computes.
struct Unit {
  int32_t row;
  int32_t cache_row;
  int32_t keys;    // that were there before the step
  int32_t newest;  // position of the new key, or -1: there is none
};

/// Behind the ring.
struct Shared {
  float4 halves[4][kConsumers];       // half of a thread's sums over half of the columns, for the other warpgroup
  uint16_t fresh[kUnits][3][kDim];    // q, k, v of the step, rotated, in T; columns in their natural order
  float rotary[kUnits][2][kDim / 2];  // cosines and sines
  float2 bounds[kUnits][kWarps];      // attention's maxima and sums
  int32_t sorted[kMaxRows];           // rows, longest first
  Unit units[kUnits];
  int32_t lengths[kMaxRows];
  int32_t unit_count;
  int32_t key_stages;  // of all units
  int32_t allowed;     // see Cta::allow
  uint64_t full[kStages], empty[kStages];
  // of a probe, the first of its head: log2 of the sum of exponentials, and the score of the newest key
  float2 probed[StepParams::kMaxProbes][kUnits];
  uint64_t attended;  // whether all of them are there
};
inline constexpr size_t kSharedBytes = kStages * kStageBytes + sizeof(Shared);
static_assert(kSharedBytes <= 227 * 1024);

inline constexpr uint32_t kTurns = 1u << 22;  // looks, before a wait is given up

/// A place in the ring.
struct Position {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    const bool wraps = slot + 1 == kStages;
    slot = wraps ? 0 : slot + 1;
    parity ^= wraps ? 1 : 0;
  }
  __device__ __forceinline__ void advance(int n) {
    slot += n;
    parity ^= slot / kStages & 1;
    slot %= kStages;
  }
};

/// The same value, of which the compiler does not know that: what is computed from it does not stay in registers for long.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
/// Likewise an address: what is added to it becomes part of the instructions.
template <typename P>
__device__ __forceinline__ P* opaque(P* x) {
  asm volatile("" : "+l"(x));
  return x;
}

/// Where a CTA stands in the mesh.
struct Cta {
  const Args& args;
  uint8_t* ring;
  Shared& shared;
  int cta, group, block, rows;

  __device__ __forceinline__ Cta(const Args& a, uint8_t* memory)
      : args(a),
        ring(memory),
        shared(*reinterpret_cast<Shared*>(memory + kStages * kStageBytes)),
        cta(static_cast<int>(blockIdx.x)),
        group(cta / kBlocks),
        block(cta % kBlocks),
        rows(static_cast<int>(a.p.rows)) {}

  template <typename P>
  __device__ __forceinline__ P* at(size_t offset) const {
    return reinterpret_cast<P*>(static_cast<uint8_t*>(args.p.workspace) + offset);
  }
  /// Attention of the group's head, (rows, 64), and gated intermediates of the group, (rows, 256).
  __device__ __forceinline__ uint8_t* attention() const {
    return at<uint8_t>(Layout::attention) + group * (2 * kMaxRows * kDim);
  }
  __device__ __forceinline__ uint8_t* gated() const { return at<uint8_t>(Layout::gated) + group * (2 * kMaxRows * kMiddle); }
  /// Features of the head that are left over from its tiles, if they are few: no tile is worth its time then.
  __device__ __forceinline__ int rest() const {
    const int left = static_cast<int>(args.p.vocab % 64);
    return left <= 8 ? left : 0;
  }
  __device__ __forceinline__ bool has_tile(int tile) const { return tile * int64_t{64} < args.p.vocab - rest(); }

  /// Not kept in a register: there are none left.
  __device__ __forceinline__ bool has_many_keys() const { return shared.key_stages > kManyStages; }
  /// How many stages may be under way: more of them hold up what CTAs tell each other. One thread; atomic, since the loading
  /// thread hears of it without a barrier.
  __device__ __forceinline__ void allow(int stages) const { atomicExch(&shared.allowed, stages); }
  __device__ __forceinline__ int allowed() const { return atomicOr(&shared.allowed, 0); }

  /// Waits until the stage is there; all lanes. Every warp waits for and releases every stage, whether it uses it or not.
  __device__ __forceinline__ uint8_t* wait(const Position& at) const {
    step::barrier_wait<kTurns>(&shared.full[at.slot], at.parity);
    return ring + at.slot * kStageBytes;
  }
  /// This warp has read the stage; one lane.
  __device__ __forceinline__ void release(const Position& at) const { sm90::barrier_arrive(&shared.empty[at.slot]); }
};

}  // namespace vivace::mesh
