// The producer of the persistent step: one thread that streams weights, keys and values.
#pragma once

#include "kernels/step/persistent_parts.cuh"

namespace vivace::step {

/// What the cache says of a row.
struct CacheRow {
  int length;   // old keys to read
  int row;      // of the cache
  bool writes;  // whether there is room for the new key
};
__device__ __forceinline__ CacheRow cache_row(const StepParams& p, int row) {
  const int length = p.cache_seqlens[row], c = p.cache_batch_idx[row];
  if (c < 0 || c >= p.cache_rows) return {0, 0, false};
  const int capacity = static_cast<int>(p.capacity);
  return {max(0, min(length, capacity)), c, length >= 0 && length < capacity};
}

/// First of the old keys that CTA `part` of a head reads; its last is before first_key(part + 1).
template <typename S>
__device__ __forceinline__ int first_key(int part, int length) {
  return static_cast<int>(static_cast<int64_t>(part) * length / S::group);
}

__device__ __forceinline__ int64_t clamp_index(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

template <int kHeads, int kRows>
__device__ __forceinline__ void produce(const PersistentArgs& args, Ring<PersistentShape<kHeads, kRows>> ring) {
  using S = PersistentShape<kHeads, kRows>;
  const StepParams& p = args.p;
  const int cta = static_cast<int>(blockIdx.x), head = cta / S::group, part = cta % S::group;
  const int rows = static_cast<int>(p.rows);

  Ring<S> landed = ring;  // the oldest stage that may still be under way when the next is asked for
  int asked = 0;
  uint32_t last = cycles() - args.pace;
  auto acquire = [&](uint32_t bytes) {
    barrier_wait(ring.empty + ring.slot, ring.parity ^ 1);
    if (++asked > args.in_flight) {
      landed.wait_full(0);
      landed.advance(1);
    }
    while (cycles() - last < args.pace) {
    }
    last = cycles();
    uint64_t* barrier = ring.full + ring.slot;
    sm90::barrier_expect(barrier, bytes);
    return barrier;
  };
  auto weights = [&](const CUtensorMap& map, int output, int group) {
    uint64_t* barrier = acquire(S::stage_bytes);
    tma_load_3d(ring.stage(0), &map, barrier, 0, output, group, sm90::kEvictFirst);
    ring.advance(1);
  };

  CacheRow cache[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) cache[r] = r < rows ? cache_row(p, r) : CacheRow{0, 0, false};

  const int layers = static_cast<int>(p.layers);
  for (int layer = 0; layer < layers; ++layer) {
    for (int i = 0; i < 3; ++i) {
      uint64_t* barrier = acquire(S::stage_bytes);
      tma_load_5d(ring.stage(0), &args.qkv, barrier, 0, 4 * part, 0, 0, (layer * 3 + i) * S::heads + head,
                  sm90::kEvictFirst);
      ring.advance(1);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int end = first_key<S>(part + 1, cache[r].length);
      for (int key = first_key<S>(part, cache[r].length); key < end; key += S::chunk) {
        const uint32_t bytes = static_cast<uint32_t>(min(S::chunk, end - key)) * S::head_dim * 2;
        uint64_t* barrier = acquire(2 * bytes);
        const int64_t k = layer * p.k_stride[0] + cache[r].row * p.k_stride[1] + key * p.k_stride[2] + head * p.k_stride[3];
        const int64_t v = layer * p.v_stride[0] + cache[r].row * p.v_stride[1] + key * p.v_stride[2] + head * p.v_stride[3];
        bulk_load(ring.stage(0), static_cast<const bf16*>(p.k_cache) + k, bytes, barrier);
        bulk_load(ring.stage(0) + S::stage_bytes / 2, static_cast<const bf16*>(p.v_cache) + v, bytes, barrier);
        ring.advance(1);
      }
    }
    {
      uint64_t* barrier = acquire(S::stage_bytes);
      tma_load_2d(ring.stage(0), &args.out, barrier, S::head_dim * head, layer * S::hidden + part * 8 * S::heads,
                  sm90::kEvictFirst);
      ring.advance(1);
    }
    for (int i = 0; i < 8; ++i) {
      weights(args.gate_up, (2 * layer + i / 4) * S::intermediate + 32 * cta + 8 * (i % 4), 0);
    }
    for (int i = 0; i < 4; ++i) weights(args.down, layer * S::hidden + 8 * cta, i * S::heads);
  }
  const int tiles = static_cast<int>((p.vocab + 7) / 8);
  for (int tile = cta; tile < tiles; tile += S::ctas) weights(args.head, 8 * tile, 0);
}

}  // namespace vivace::step
