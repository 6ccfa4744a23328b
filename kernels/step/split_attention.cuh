// Attention of the split step: a warpgroup takes one unit, a row and a head, at a time.
//
// A stage of the ring holds 64 keys and their values; warp w of the four has keys 16 w ... 16 w + 15 of it. In a warp 8
// lanes share a key, 16 bytes each. Each of the 16 groups of 8 lanes has a softmax state of its own; they are merged in a
// fixed order at the end, so what a row computes depends on its own length alone. The newest key and value come from memory.
#pragma once

#include "kernels/step/split_parts.cuh"

namespace vivace::split {

template <typename T, typename S>
class Attention {
 public:
  __device__ __forceinline__ Attention(const AttentionCta<S>& c, int group, int warp, int lane)
      : c_(c),
        group_(group),
        warp_(warp),
        lane_(lane),
        dim_(lane % 8 * 8),
        scale_(c.args.p.softmax_scale * 1.4426950408889634f) {}

  /// This warpgroup's units of a half in one layer. What others have written must be visible.
  __device__ __forceinline__ void run(int layer, int half, Position& ring) {
    const StepParams& p = c_.args.p;
    k_ = static_cast<const T*>(p.k_cache) + layer * p.k_stride[0] + dim_;
    v_ = static_cast<const T*>(p.v_cache) + layer * p.v_stride[0] + dim_;
    half_ = half;
    const typename AttentionCta<S>::Units units = c_.units(layer, half, group_);
    Fresh next = fetch(units, 0);
    for (int u = 0; u < units.count; ++u) {
      const Fresh fresh = next;
      next = fetch(units, u + 1);
      unit(c_.shared.rows[half][units[u] / S::heads], units[u] % S::heads, fresh, c_.shared.merged[group_][turn_ % 2], layer,
           ring);
      ++turn_;
    }
    sm90::named_barrier_sync(2 + group_, 128);
    if (warp_ == 0 && lane_ == 0) add_release(c_.counter(Counters::attended + half));
  }

 private:
  /// The query, the newest key and the newest value of a unit: this lane's 8 dimensions.
  struct Fresh {
    uint4 q, k, v;
  };

  __device__ __forceinline__ Fresh fetch(const typename AttentionCta<S>::Units& units, int u) const {
    Fresh fresh = {};
    if (u < units.count) {
      const StepParams& p = c_.args.p;
      const int head = units[u] % S::heads;
      const Row row = c_.shared.rows[half_][units[u] / S::heads];
      const T* q = c_.template at<const T>(half_, AttentionCta<S>::L::q) + row.row * S::hidden + head * 64 + dim_;
      fresh.q = __ldcg(reinterpret_cast<const uint4*>(q));
      if (warp_ == 0 && row.newest >= 0) {
        const int64_t at = row.newest * int64_t{64};
        fresh.k = __ldcg(reinterpret_cast<const uint4*>(k_ + head * p.k_stride[3] + row.cache_row * p.k_stride[1] + at));
        fresh.v = __ldcg(reinterpret_cast<const uint4*>(v_ + head * p.v_stride[3] + row.cache_row * p.v_stride[1] + at));
      }
    }
    return fresh;
  }

  static __device__ __forceinline__ float dot(const float (&a)[8], const float (&b)[8]) {
    float s = 0.0f;
#pragma unroll
    for (int d = 0; d < 8; ++d) s += a[d] * b[d];
    return s;
  }

  __device__ __forceinline__ void unit(const Row& unit, int head, const Fresh& fresh, float* states, int layer,
                                       Position& ring) {
    const int keys = unit.keys;
    float q[8];
    unpack_vector<T>(fresh.q, q);
#pragma unroll
    for (int d = 0; d < 8; ++d) q[d] *= scale_;

    State state;
    if (warp_ == 0 && unit.newest >= 0) {
      float k[8];
      unpack_vector<T>(fresh.k, k);
      float s = dot(q, k);
#pragma unroll
      for (int distance = 4; distance > 0; distance /= 2) s += __shfl_xor_sync(~0u, s, distance);
      if (lane_ < 8) {
        state.max = s;
        state.sum = 1.0f;
        unpack_vector<T>(fresh.v, state.out);
      }
    }
    int first = 0;
    for (; first + 64 < keys; first += 128) stages<2>(state, q, keys - first, ring);
    if (first < keys) stages<1>(state, q, keys - first, ring);

    state.merge(8);
    state.merge(16);
    state.store(states, warp_, lane_, dim_);  // (4, kFloats): the set of the turn before may still be read
    sm90::named_barrier_sync(2 + group_, 128);
    if (warp_ == turn_ % 4) {
      const step::SoftmaxOutput o(states, lane_);
      uint32_t* to =
          c_.template at<uint32_t>(half_, AttentionCta<S>::L::attention) + (unit.row * S::hidden + head * 64) / 2 + lane_;
      *to = pack2<T>(o.lo, o.hi);
    }
    probe(unit, head, q, states, layer);
  }

  /// The next kCount stages, with keys of a row in the first `keys` places.
  template <int kCount>
  __device__ __forceinline__ void stages(State& state, const float (&q)[8], int keys, Position& ring) const {
    constexpr int kKeys = 4 * kCount;  // of this group of lanes
    const int mine = 16 * warp_ + lane_ / 8, offset_in_stage = mine * 128 + dim_ * 2;
    Position at = ring;
    uint32_t address[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      address[i] = ptx::shared_address(c_.ring + (group_ * S::attention_stages + at.slot) * kStageBytes) + offset_in_stage;
      barrier_wait(&c_.shared.full[group_][at.slot], at.parity);
      at.next(S::attention_stages);
    }
    float s[kKeys];  // of keys 16 warp + lane / 8 + 4 (u % 4) of stage u / 4: 512 bytes are four keys
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float k[8];
      unpack_vector<T>(ptx::ld_shared_v4(address[u / 4] + u % 4 * 512), k);
      s[u] = dot(q, k);
    }
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
#pragma unroll
      for (int u = 0; u < kKeys; ++u) s[u] += __shfl_xor_sync(~0u, s[u], distance);
    }
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      if (u / 4 * 64 + u % 4 * 4 + mine >= keys) s[u] = -INFINITY;  // whatever the stage held before
    }
    const float offset = state.raise(s);
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      const float e = ptx::exp2_approx(s[u] - offset);
      state.sum += e;
      uint4 bits = ptx::ld_shared_v4(address[u / 4] + kStageBytes / 2 + u % 4 * 512);
      if (u / 4 * 64 + u % 4 * 4 + mine >= keys) bits = make_uint4(0, 0, 0, 0);
      float v[8];
      unpack_vector<T>(bits, v);
#pragma unroll
      for (int d = 0; d < 8; ++d) state.out[d] += e * v[d];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (lane_ == 0) sm90::barrier_arrive(&c_.shared.empty[group_][ring.slot]);
      ring.next(S::attention_stages);
    }
  }

  /// Writes the row's probabilities where somebody asks for this head.
  __device__ __forceinline__ void probe(const Row& unit, int head, const float (&q)[8], const float* states,
                                        int layer) const {
    const StepParams& p = c_.args.p;
    if (p.probes == nullptr) return;
    for (int i = 0; i < static_cast<int>(p.probe_count); ++i) {
      if (p.probe_layer[i] != layer || p.probe_head[i] != head) continue;
      const step::SoftmaxOutput o(states, lane_);
      const float offset = o.offset, inverse = o.sum == 0.0f ? 0.0f : 1.0f / o.sum;
      const T* k = k_ + unit.cache_row * p.k_stride[1] + head * p.k_stride[3];
      float* to = p.probes + (i * p.probe_rows + half_ * c_.first() + unit.row) * p.probe_capacity;
      const int seen = unit.newest >= 0 ? unit.newest + 1 : unit.keys;
      for (int64_t first = 0; first < p.probe_capacity; first += 16) {
        const int64_t key = first + 4 * warp_ + lane_ / 8;
        float s = 0.0f;
        if (key < seen) {
          float x[8];
          unpack_vector<T>(__ldcg(reinterpret_cast<const uint4*>(k + key * 64)), x);
          s = dot(q, x);
        }
#pragma unroll
        for (int distance = 4; distance > 0; distance /= 2) s += __shfl_xor_sync(~0u, s, distance);
        if (lane_ % 8 == 0 && key < p.probe_capacity) to[key] = key < seen ? ptx::exp2_approx(s - offset) * inverse : 0.0f;
      }
    }
  }

  const AttentionCta<S>& c_;
  int group_, warp_, lane_, dim_, half_ = 0;
  float scale_;
  const T *k_ = nullptr, *v_ = nullptr;
  int turn_ = 0;  // units of this warpgroup before this one
};

}  // namespace vivace::split
