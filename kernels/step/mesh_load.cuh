// The thread of the mesh step that streams what the step does not write: weights, and keys and values of earlier steps.
#pragma once

#include "kernels/step/mesh_parts.cuh"

namespace vivace::mesh {

/// Fills the ring in the order of use, a copy or two a stage; waits for free stages alone.
class Loader {
 public:
  __device__ __forceinline__ explicit Loader(const Cta& c) : c_(c) {}

  /// One loop over all matrices, so that there is one copy of what a stage takes.
  __device__ __forceinline__ void run() {
    const Args& args = c_.args;
    const int layers = static_cast<int>(args.p.layers);
    int tile = c_.cta;
#pragma unroll 1
    for (int step = 0;; ++step) {
      const int layer = step / 4, matrix = layer == layers ? 4 : step % 4;
      const CUtensorMap* map;
      int stages, column = 0, row, block = 0;  // of the box; block: of columns, or of halves of them
      int columns = 0, rows = 0, blocks = 0;   // from a stage to the next
      if (matrix == 0) {
        // q, k, v: (2 column blocks, 64 features, 64)
        map = &args.qkv, stages = 3, row = 3 * layer * kHidden + kDim * c_.group, block = 2 * c_.block, rows = kHidden;
      } else if (matrix == 1) {
        keys(layer);
        // (128 features, 64)
        map = &args.out, stages = 1, row = layer * kHidden + kColumns * c_.block, block = c_.group;
      } else if (matrix == 2) {
        // (half of the columns, gate and up, 32 features, 64)
        map = &args.gate_up, stages = kHidden / 128, row = kMiddle * c_.group + kShare * c_.block, columns = 64;
      } else if (matrix == 3) {
        // (128 features, 64)
        map = &args.down, stages = kMiddle / 64, row = layer * kHidden + kColumns * c_.block;
        block = kMiddle / 64 * c_.group, blocks = 1;
      } else {
        if (!c_.has_tile(tile)) return;
        // (half of the columns, 64 features, 64)
        map = &args.head, stages = kHidden / 128, row = 64 * tile, columns = 64;
        tile += kCtas;
        --step;
      }
#pragma unroll 1
      for (int s = 0; s < stages; ++s) {
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          if (matrix == 2) {
            sm90::tma_load_5d(to, map, barrier, column, row, 0, 0, layer, kHint);
          } else {
            sm90::tma_load_3d(to, map, barrier, column, row, block, kHint);
          }
        });
        column += columns;
        row += rows;
        block += blocks;
      }
    }
  }

 private:
  static constexpr uint64_t kHint = sm90::kEvictFirst;  // all of it is read once

  /// Keys and values of the CTA's rows, 64 at a time: (keys, 64), and values half a stage on; as many as there are, in
  /// eights.
  __device__ __forceinline__ void keys(int layer) {
    const Args& args = c_.args;
#pragma unroll 1
    for (int u = 0; u < c_.shared.unit_count; ++u) {
      const Unit unit = c_.shared.units[u];
#pragma unroll 1
      for (int key = 0; key < unit.keys; key += 64) {
        const int eights = min(8, (unit.keys - key + 7) / 8);
        fill(eights * 2048, [&](uint8_t* to, uint64_t* barrier) {
          const CUtensorMap* k = &args.keys[eights - 1];
          sm90::tma_load_5d(to, k, barrier, 0, key, c_.group, unit.cache_row, layer, kHint);
          const CUtensorMap* v = &args.values[eights - 1];
          sm90::tma_load_5d(to + kStageBytes / 2, v, barrier, 0, key, c_.group, unit.cache_row, layer, kHint);
        });
      }
    }
  }

  /// copy(stage, barrier) starts copies of `bytes` in all.
  template <typename F>
  __device__ __forceinline__ void fill(uint32_t bytes, F&& copy) {
    uint64_t *full = &c_.shared.full[at_.slot], *empty = &c_.shared.empty[at_.slot];
    step::barrier_wait<kTurns>(empty, at_.parity ^ 1);
    // Few at a time: what queues in front of memory holds up what the CTAs tell each other.
    while (under_way_ >= c_.allowed()) {
      step::barrier_wait<kTurns>(&c_.shared.full[landed_.slot], landed_.parity);
      landed_.next();
      --under_way_;
    }
    ++under_way_;
    sm90::barrier_expect(full, bytes);
    copy(c_.ring + at_.slot * kStageBytes, full);
    at_.next();
  }

  const Cta& c_;
  Position at_, landed_;
  int under_way_ = 0;
};

/// All weights of the CTA, and keys and values of earlier steps. By one thread.
__device__ __forceinline__ void stream(const Cta& c) { Loader(c).run(); }

}  // namespace vivace::mesh
