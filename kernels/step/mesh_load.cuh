// The thread of the mesh step that streams what the step does not write: weights, and keys and values of earlier steps.
#pragma once

#include "kernels/step/mesh_parts.cuh"

namespace vivace::mesh {

/// Fills the ring in the order of use, a copy or two a stage; waits for free stages alone.
class Loader {
 public:
  __device__ __forceinline__ explicit Loader(const Cta& c) : c_(c) {}

  __device__ __forceinline__ void run() {
    const Args& args = c_.args;
    const int layers = static_cast<int>(args.p.layers);
#pragma unroll 1
    for (int layer = 0; layer < layers; ++layer) {
#pragma unroll 1
      for (int m = 0; m < 3; ++m) {  // q, k, v: (2 column blocks, 64 features, 64)
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          sm90::tma_load_3d(to, &args.qkv, barrier, 0, (3 * layer + m) * kHidden + kDim * c_.group, 2 * c_.block, kHint);
        });
      }
      keys(layer);
      fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {  // (128 features, 64)
        sm90::tma_load_3d(to, &args.out, barrier, 0, layer * kHidden + kColumns * c_.block, c_.group, kHint);
      });
#pragma unroll 1
      for (int s = 0; s < kHidden / 128; ++s) {  // (half of the columns, gate and up, 32 features, 64)
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          sm90::tma_load_5d(to, &args.gate_up, barrier, 64 * s, kMiddle * c_.group + kShare * c_.block, 0, 0, layer, kHint);
        });
      }
#pragma unroll 1
      for (int s = 0; s < kMiddle / 64; ++s) {  // (128 features, 64)
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          sm90::tma_load_3d(to, &args.down, barrier, 0, layer * kHidden + kColumns * c_.block, kMiddle / 64 * c_.group + s,
                            kHint);
        });
      }
    }
#pragma unroll 1
    for (int tile = c_.cta; c_.has_tile(tile); tile += kCtas) {
#pragma unroll 1
      for (int s = 0; s < kHidden / 128; ++s) {  // (half of the columns, 64 features, 64)
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          sm90::tma_load_3d(to, &args.head, barrier, 64 * s, 64 * tile, 0, kHint);
        });
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
