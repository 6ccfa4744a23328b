// The producer of the persistent step: one thread that streams weights, keys and values.
#pragma once

#include "kernels/step/persistent_keys.cuh"

namespace vivace::step {

template <int kHeads, int kRows>
__device__ __forceinline__ void produce(const PersistentArgs& args, Ring<PersistentShape<kHeads, kRows>> ring) {
  using S = PersistentShape<kHeads, kRows>;
  const StepParams& p = args.p;
  const int cta = static_cast<int>(blockIdx.x), head = cta / S::group, part = cta % S::group;
  const int rows = static_cast<int>(p.rows);

  Ring<S> landed = ring;  // the oldest stage that may still be under way when the next is asked for
  int under_way = 0, most = S::in_flight_unpaced;
  uint32_t pace = 0, last = 0;  // cycles between stages at least; when the last one was asked for
  auto acquire = [&](uint32_t bytes) {
    barrier_wait(ring.empty + ring.slot, ring.parity ^ 1);
    for (; under_way >= most; --under_way) {
      landed.wait_full(0);
      landed.advance(1);
    }
    ++under_way;
    uint32_t now;
    do {
      now = static_cast<uint32_t>(clock());
    } while (now - last < pace);
    last = now;
    uint64_t* barrier = ring.full + ring.slot;
    sm90::barrier_expect(barrier, bytes);
    return barrier;
  };
  const int layers = static_cast<int>(p.layers), tiles = static_cast<int>((p.vocab + 7) / 8);

  auto weights = [&](const CUtensorMap& map, int output, int group) {
    uint64_t* barrier = acquire(S::stage_bytes);
    sm90::tma_load_3d(ring.stage(0), &map, barrier, 0, output, group, sm90::kEvictFirst);
    ring.advance(1);
  };
  auto load_qkv = [&](int layer) {
    for (int i = 0; i < 3; ++i) {
      uint64_t* barrier = acquire(S::stage_bytes);
      sm90::tma_load_5d(ring.stage(0), &args.qkv, barrier, 0, 4 * part, 0, 0, (layer * 3 + i) * S::heads + head,
                        sm90::kEvictFirst);
      ring.advance(1);
    }
  };
  // Weights do not depend on the kernels before.
  load_qkv(0);
  ptx::grid_dependency_wait();

  // The pace is in cycles, of a clock that changes: each step measures it for the next one.
  int* clock_word = reinterpret_cast<int*>(static_cast<uint8_t*>(p.workspace) + Mailboxes<kHeads>::clock);
  const int cycles_per_us = load_now(clock_word);
  int length[kRows], cache_index[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    length[r] = load_now(p.cache_seqlens + min(r, rows - 1));
    cache_index[r] = load_now(p.cache_batch_idx + min(r, rows - 1));
  }
  CacheRow cache[kRows];
  bool few = true;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    cache[r] = r < rows ? cache_row(p, length[r], cache_index[r]) : CacheRow{0, 0, false};
    few = few && cache[r].length <= S::few_keys;
  }
  const int64_t start = clock64(), start_ns = global_ns();
  if (few) pace = static_cast<uint32_t>(args.stage_ns * 1e-3f * static_cast<float>(min(cycles_per_us, 4096)));
  if (pace > 0) most = S::in_flight;

  for (int layer = 0; layer < layers; ++layer) {
    if (layer > 0) load_qkv(layer);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const KeyRange range = key_range<S>(layer, r, part, cache[r].length);
      for (int key = range.first; key < range.end; key += S::chunk) {
        // A whole stage at once, or 8 keys at a time: no more than 7 too many.
        const bool whole = range.end - key >= S::chunk;
        const int step = whole ? S::chunk : 8, boxes = whole ? 1 : (range.end - key + 7) / 8;
        const CUtensorMap *k = args.k + (whole ? 0 : 1), *v = args.v + (whole ? 0 : 1);
        uint64_t* barrier = acquire(static_cast<uint32_t>(boxes * step) * 256);
        for (int i = 0; i < boxes; ++i) {
          uint8_t* to = ring.stage(0) + i * 1024;
          sm90::tma_load_5d(to, k, barrier, 0, key + 8 * i, head, cache[r].row, layer, sm90::kEvictFirst);
          sm90::tma_load_5d(to + S::stage_bytes / 2, v, barrier, 0, key + 8 * i, head, cache[r].row, layer,
                            sm90::kEvictFirst);
        }
        ring.advance(1);
      }
    }
    weights(args.out, layer * S::hidden + 8 * cta, 0);
    for (int i = 0; i < 8; ++i) {
      weights(args.gate_up, (2 * layer + i / 4) * S::intermediate + 32 * cta + 8 * (i % 4), 0);
    }
    for (int i = 0; i < 4; ++i) weights(args.down, layer * S::hidden + 8 * cta, i * S::heads);
  }
  for (int tile = cta; tile < tiles; tile += S::ctas) weights(args.head, 8 * tile, 0);
  // Every CTA has read the last one: it has been heard of since.
  const float us = 1e-3f * static_cast<float>(global_ns() - start_ns), cycles = static_cast<float>(clock64() - start);
  if (cta == 0 && us > 100.0f) *clock_word = static_cast<int>(cycles / us);
}

}  // namespace vivace::step
