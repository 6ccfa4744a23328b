// The loading threads of the split step: of each role one or two that stream what the step does not write, and one that
// waits for what it does.
#pragma once

#include "kernels/step/split_deal.cuh"

namespace vivace::split {

/// Fills a ring; kLimited: with at most `limit` stages under way at a time.
template <int kStages, bool kLimited>
class Filler {
 public:
  __device__ __forceinline__ Filler(uint8_t* ring, uint64_t* full, uint64_t* empty, int limit = kStages)
      : ring_(ring), full_(full), empty_(empty), limit_(limit) {}
  /// copy(stage, barrier) starts copies of `bytes` in all.
  template <typename F>
  __device__ __forceinline__ void operator()(uint32_t bytes, F&& copy) {
    barrier_wait(&empty_[at_.slot], at_.parity ^ 1);
    if constexpr (kLimited) {
      for (; under_way_ >= limit_; --under_way_) {
        barrier_wait(&full_[landed_.slot], landed_.parity);
        landed_.next(kStages);
      }
      ++under_way_;
    }
    uint64_t* barrier = &full_[at_.slot];
    sm90::barrier_expect(barrier, bytes);
    copy(ring_ + at_.slot * kStageBytes, barrier);
    at_.next(kStages);
  }
  __device__ __forceinline__ void set_limit(int limit) { limit_ = limit; }

 private:
  uint8_t* ring_;
  uint64_t *full_, *empty_;
  int limit_, under_way_ = 0;
  Position at_, landed_;
};

/// Keys and values of earlier steps for a warpgroup, in the order of use; a stage is 64 keys (64, 64 dimensions) and behind
/// them their values. Waits for free stages alone.
template <typename S>
__device__ __forceinline__ void stream_keys(const AttentionCta<S>& c, int group) {
  const StepParams& p = c.args.p;
  // Few at a time: what queues in front of memory holds up the products. Where rows have many keys, those have time; where a
  // part has few, it is they that take it, and there are one and two in turn. The numbers are measured.
  const int limit = c.shared.keys[0] < 512 * c.rows_of(0) ? 2 : 3;
  const bool few = S::parts == 2 && c.most_keys() < 10400;
  Filler<S::attention_stages, true> fill(c.ring + group * S::attention_stages * kStageBytes, c.shared.full[group],
                                         c.shared.empty[group], limit);
  Dealer<S> dealer(c, group);
  Position at;
  Unit unit;
  int keys = 0;  // that are left of the unit, from k and v on
  const uint16_t *k = nullptr, *v = nullptr;
  const auto find = [&] {  // the next unit, and tells the warps
    unit = dealer.next();
    barrier_wait(&c.shared.taken[group][at.slot], at.parity ^ 1);
    c.shared.units[group][at.slot] = unit;
    sm90::barrier_arrive(&c.shared.told[group][at.slot]);
    at.next(kUnits);
    if (unit.slot == dealer.slots()) return;
    if (few) fill.set_limit(1 + (unit.place + unit.head + group) % 2);
    const Row row = c.shared.rows[dealer.part()][unit.place];
    const int layer = unit.slot / S::parts;
    keys = row.keys;
    k = static_cast<const uint16_t*>(p.k_cache) + layer * p.k_stride[0] + row.cache_row * p.k_stride[1] +
        unit.head * p.k_stride[3];
    v = static_cast<const uint16_t*>(p.v_cache) + layer * p.v_stride[0] + row.cache_row * p.v_stride[1] +
        unit.head * p.v_stride[3];
  };
  const auto copy = [&](const uint16_t* from_k, const uint16_t* from_v, uint32_t bytes) {
    fill(2 * bytes, [&](uint8_t* to, uint64_t* barrier) {
      bulk_load(to, from_k, bytes, barrier, sm90::kEvictFirst);
      bulk_load(to + kStageBytes / 2, from_v, bytes, barrier, sm90::kEvictFirst);
    });
  };
  for (find(); unit.slot < dealer.slots();) {
    if (keys == 0) {
      find();
      continue;
    }
    for (; keys > 64; keys -= 64, k += 64 * 64, v += 64 * 64) {
      if (keys <= 128) dealer.ask();
      copy(k, v, kStageBytes / 2);
    }
    const uint16_t *last_k = k, *last_v = v;
    const uint32_t bytes = keys * 128;
    find();  // before there is room for the last stage
    copy(last_k, last_v, bytes);
  }
}

/// All weights of the CTA, in the order of use, for each part. Waits for free stages alone.
template <typename S>
__device__ __forceinline__ void stream_weights(const ProductCta<S>& c) {
  const Args& args = c.args;
  const int layers = static_cast<int>(args.p.layers);
  Filler<S::stages, false> fill(c.ring, c.shared.full, c.shared.empty);
  // The other parts read what the first has brought to L2, and nobody has a use for it after the last.
  uint64_t hint = 0;
  const auto begin = [&](int part) { hint = part + 1 < S::parts ? sm90::kEvictNormal : sm90::kEvictFirst; };
  const auto qkv = [&](int layer) {
    for (int s = 0; s < S::blocks / 2; ++s) {
      fill(2 * 6144, [&](uint8_t* to, uint64_t* barrier) {
        // (warpgroup, block, q k v, eight of features): i and 32 + i, a rotary pair, in one eight
        for (int i = 0; i < 2; ++i) {
          const int row = layer * 3 * S::hidden + c.cta / 4 * 64 + c.cta % 4 * 8 + 4 * i;
          sm90::tma_load_5d(to + i * 6144, &args.qkv, barrier, 0, row, 0, 0, 2 * s, hint);
        }
      });
    }
  };
  for (int part = 0; part < S::parts; ++part) {
    begin(part);
    qkv(0);
  }
  for (int layer = 0; layer < layers; ++layer) {
    for (int part = 0; part < S::parts; ++part) {
      begin(part);
      for (int s = 0; s < (S::blocks + 7) / 8; ++s) {
        fill(S::out_blocks * 2048, [&](uint8_t* to, uint64_t* barrier) {
          sm90::tma_load_3d(to, &args.out, barrier, 0, layer * S::hidden + 16 * c.cta, 8 * s, hint);
        });
      }
      for (int s = 0; s < S::blocks; ++s) {
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          // (warpgroup, gate and up, 32 features)
          sm90::tma_load_5d(to, &args.gate_up, barrier, 64 * s, 0, 0, 2 * c.cta, layer, hint);
        });
      }
      for (int s = 0; s < S::blocks / 2; ++s) {
        fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
          sm90::tma_load_3d(to, &args.down, barrier, 0, layer * S::hidden + 64 * c.tile, c.slice * S::blocks + 2 * s, hint);
        });
      }
      if (layer + 1 < layers) {
        qkv(layer + 1);
        continue;
      }
      for (int tile = c.cta; c.has_tile(tile); tile += S::products) {
        for (int s = 0; s < S::blocks; ++s) {
          fill(kStageBytes, [&](uint8_t* to, uint64_t* barrier) {
            sm90::tma_load_3d(to, &args.head, barrier, 0, S::tile * tile, s, hint);
          });
        }
      }
    }
  }
}

/// Waits for what other CTAs write, tells the warpgroups, and loads it where it is an operand.
template <typename S>
__device__ __forceinline__ void load_activations(const ProductCta<S>& c) {
  const Args& args = c.args;
  const uint32_t layers = static_cast<uint32_t>(args.p.layers);
  Position at;
  const auto load_group = [&](const CUtensorMap& map, int first) {
    barrier_wait(&c.shared.x_empty[at.slot], at.parity ^ 1);
    sm90::barrier_expect(&c.shared.x_full[at.slot], S::group * S::block_bytes);
    sm90::tma_load_3d(c.x + at.slot * S::group * S::block_bytes, &map, &c.shared.x_full[at.slot], 0, 0, first,
                      sm90::kEvictLast);
    at.next(S::groups);
  };
  const auto load = [&](const uint8_t* from) {
    fence_async_global();
    constexpr int kBytes = S::group * S::block_bytes;
    for (int b = 0; b < S::blocks; b += S::group) {
      barrier_wait(&c.shared.x_empty[at.slot], at.parity ^ 1);
      sm90::barrier_expect(&c.shared.x_full[at.slot], kBytes);
      bulk_load(c.x + at.slot * kBytes, from + b * S::block_bytes, kBytes, &c.shared.x_full[at.slot], sm90::kEvictLast);
      at.next(S::groups);
    }
  };
  using L = Layout<S::heads>;
  const auto x_of = [&](int part) { return c.template at<const uint8_t>(part, L::x); };
  // Counts since the workspace was zeroed: of launches before this one, and what this one has added.
  const uint32_t* before = c.shared.before;
  uint32_t x[S::parts];
#pragma unroll
  for (int part = 0; part < S::parts; ++part) x[part] = before[part] * (2 * layers + 1) * S::workers;
  const auto wait_x = [&](int part) {
    x[part] += S::workers;
    wait_counter(c.counter(Counters::x + part), x[part]);
    sm90::barrier_arrive(&c.shared.ready);
  };
  for (int part = 0; part < S::parts; ++part) {
    wait_x(part);
    load(x_of(part));
  }
  const int sums = Counters::down + c.cta / 4 * 2 + c.cta % 4 / 2;  // of the half tile with this CTA's 16 features
  for (uint32_t layer = 0; layer < layers; ++layer) {
    for (int part = 0; part < S::parts; ++part) {
      const uint32_t n = before[part] * layers + layer + 1;  // layers since the workspace was zeroed; wraps
      for (int group = 0; group < S::head_groups; ++group) {
        wait_counter(c.counter(Counters::attended + 4 * part + group), args.signals * n);
        fence_async_global();
        load_group(args.attention[part], group * S::group);
      }
      // Nobody asks any more.
      if (c.cta == 0) *c.asked(S::parts * layer + part) = 0;
      wait_x(part);
      load(x_of(part));
      wait_counter(c.counter(Counters::gated + 4 * part + c.slice), 2 * S::heads * n);
      load(c.template at<const uint8_t>(part, L::gated) + c.slice * S::blocks * S::block_bytes);
      wait_counter(c.counter(sums + 32 * part), S::slices * n);
      sm90::barrier_arrive(&c.shared.ready);
      wait_x(part);
      if (layer + 1 < layers) {
        load(x_of(part));
      } else {
        for (int tile = c.cta; c.has_tile(tile); tile += S::products) load(x_of(part));
      }
    }
  }
  // Every CTA has been heard of since it read the numbers.
  for (int part = 0; part < S::parts && c.cta == 0; ++part) *c.counter(Counters::launches + part) = before[part] + 1;
}

}  // namespace vivace::split
