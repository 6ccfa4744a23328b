// Attention of the mesh step: the eight warps take one stage of keys after the other, a head's keys in the cache.
//
// A stage of the ring holds 64 keys of a row and, half a stage on, their values, rows of 128 swizzled bytes. A warp loads
// all of it into its registers and makes room in the ring for the next ones before it computes, and its first stage before
// the query is there: eight stages more than the ring holds are in the CTA when attention begins. Stage i of a row belongs
// to its softmax state i % 8, which a warp has to itself; the states meet when all rows are done, and are merged in a fixed
// order, so what a row computes depends on its own length alone. Keys are the M of mma, the query all columns of B; and so
// are dimensions, the weights being B: its even columns have them rounded, its odd ones what that has taken off.
#pragma once

#include "kernels/step/mesh_probe.cuh"
#include "kernels/step/mesh_vector.cuh"

namespace vivace::mesh {

template <typename T, bool kProbes>
class Attention {
 public:
  __device__ __forceinline__ Attention(const Cta& c, int warp, int lane)
      : c_(c),
        warp_(warp),
        lane_(lane),
        key_offset_(lane / 8 % 2 * 1024 + lane % 8 * 128 + (lane / 16 ^ lane % 8) * 16),
        value_offset_(kStageBytes / 2 + lane / 16 * 1024 + lane % 8 * 128 + (lane / 8 % 2 ^ lane % 8) * 16),
        scale_(score_scale(c)) {}

  /// A stage: keys 16 t, dimensions 16 i (k[i][t]), and values of the same (v[t][i]), as mma wants them.
  struct Held {
    uint32_t k[4][4][4], v[4][4][4];
  };

  /// The first stage that the warp attends, with `ring` where attention begins.
  __device__ __forceinline__ void hold_first(Held& held, Position ring) const {
    if (warp_ < c_.shared.key_stages) {
      ring.advance(warp_);
      hold(held, ring);
    } else {  // or the compiler keeps the registers over a layer
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) held.k[i][t][e] = held.v[i][t][e] = 0;
        }
      }
    }
  }

  /// All rows of the CTA in one layer; q, k and v of the step are in shared.fresh, the warp's first stage is held.
  __device__ __forceinline__ void run(int layer, Position& ring, Held& held) {
    const int units = c_.shared.unit_count, mine = kWarps - 1 - warp_;  // the unit that this warp merges
    const float newest = mine < units ? score_of_newest(mine) : -INFINITY;
    const Probe<kProbes> probe(c_, layer);
    int before = 0;  // stages of earlier units
    bool is_held = true;
#pragma unroll 1
    for (int u = 0; u < units; ++u) {
      const Unit unit = c_.shared.units[u];
      const int stages = (unit.keys + 63) / 64, part = (warp_ - before) & (kWarps - 1);
      before += stages;
      if (part < stages) {
        uint32_t q[8];  // dimensions 8 i + 2 (lane % 4) + {0, 1}
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] = words(u, 0)[4 * i + lane_ % 4];
        State state;
        Position at = ring;
        at.advance(part);
#pragma unroll 1
        for (int i = part; i < stages; i += kWarps, at.advance(kWarps)) {
          if (!is_held) hold(held, at);
          is_held = false;
          attend(state, q, unit.keys - 64 * i, held, probe.scores(unit, i));
        }
        store(state, u, part);
      }
      ring.advance(stages);
    }
    sm90::named_barrier_sync(kMerge, kConsumers);
    if (mine < units) merge(c_.shared.units[mine], mine, newest, layer, probe);
    probe.attended();
  }

 private:
  /// Over some keys, scores in powers of two: the maximum; the sum over the keys of this lane's quad; of the unnormalised
  /// output dimensions 16 i + lane / 4 (out[i][0] and [1], rounded weights and rest) and + 8 ([2] and [3]).
  struct State {
    float max = -INFINITY, sum = 0.0f, out[4][4] = {};
  };
  static_assert(kUnits <= kWarps && sizeof(Shared::halves) >= kUnits * kWarps * kDim * 4);

  __device__ __forceinline__ const uint32_t* words(int u, int which) const {
    return reinterpret_cast<const uint32_t*>(c_.shared.fresh[u][which]);
  }
  /// Outputs (64) of a part of a unit; shared.bounds has its maximum and sum.
  __device__ __forceinline__ float* output(int u, int part) const {
    return reinterpret_cast<float*>(c_.shared.halves) + (u * kWarps + part) * kDim;
  }

  /// Of the step's own key, -inf without.
  __device__ __forceinline__ float score_of_newest(int u) const {
    const float2 q = unpack2<T>(words(u, 0)[lane_]), k = unpack2<T>(words(u, 1)[lane_]);
    float s = q.x * k.x + q.y * k.y;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) s += __shfl_xor_sync(~0u, s, distance);
    return c_.shared.units[u].newest >= 0 ? s * scale_ : -INFINITY;
  }

  /// Takes a stage out of the ring.
  __device__ __forceinline__ void hold(Held& held, const Position& at) const {
    const uint32_t stage = ptx::shared_address(c_.wait(at));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) ptx::ldmatrix_x4(held.k[i][t], (stage + key_offset_ + 2048 * t) ^ 32 * i);
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4_trans(held.v[t][i], (stage + value_offset_ + 2048 * t) ^ 32 * i);
    }
    __syncwarp();
    if (lane_ == 0) barrier_arrive(&c_.shared.empty[at.slot], kWarps);
  }

  /// A stage, with keys of the row in the first `keys` places.
  __device__ __forceinline__ void attend(State& state, const uint32_t (&q)[8], int keys, Held& held,
                                         const ProbedScores<kProbes>& probed) const {
    float d[4][4] = {};  // keys 16 t + lane / 4 (d[t][0]) and + 8 (d[t][2])
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int t = 0; t < 4; ++t) ptx::mma_m16n8k16<T>(d[t], held.k[i][t], q[2 * i], q[2 * i + 1]);
    }
    float s[8];
    const int valid = keys - lane_ / 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) s[j] = 8 * j < valid ? d[j / 2][j % 2 * 2] : -INFINITY;  // whatever the stage held before
    probed.store(s, lane_);
    float largest = fmaxf(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])), fmaxf(fmaxf(s[4], s[5]), fmaxf(s[6], s[7])));
#pragma unroll
    for (int distance = 4; distance <= 16; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    largest *= scale_;
    if (largest > state.max) {  // the same in all lanes; a stage has a key
      const float rescale = ptx::exp2_approx(state.max - largest);
      state.max = largest;
      state.sum *= rescale;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.out[i][e] *= rescale;
      }
    }
    uint32_t weights[8];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float x = ptx::exp2_approx(s[j] * scale_ - state.max), y = ptx::exp2_approx(s[j + 1] * scale_ - state.max);
      state.sum += x + y;
      const float2 rounded = unpack2<T>(pack2<T>(x, y));
      weights[j] = ptx::movmatrix_trans(pack2<T>(x, x - rounded.x));
      weights[j + 1] = ptx::movmatrix_trans(pack2<T>(y, y - rounded.y));
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (keys < 64) {  // what lies behind the last key may be no number
        const int left = keys - 16 * t - lane_ % 4 * 2;
        const uint32_t low = left > 1 ? ~0u : left == 1 ? 0xffffu : 0u, high = left > 9 ? ~0u : left == 9 ? 0xffffu : 0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t(&v)[4] = held.v[t][i];
          v[0] &= low, v[1] &= low, v[2] &= high, v[3] &= high;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::mma_m16n8k16<T>(state.out[i], held.v[t][i], weights[2 * t], weights[2 * t + 1]);
    }
  }

  /// For the merge.
  __device__ __forceinline__ void store(State& state, int u, int part) const {
    float* to = output(u, part) + lane_ / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lane_ % 4 == i) {
        to[16 * i] = state.out[i][0] + state.out[i][1];
        to[16 * i + 8] = state.out[i][2] + state.out[i][3];
      }
    }
#pragma unroll
    for (int distance = 4; distance <= 16; distance *= 2) state.sum += __shfl_xor_sync(~0u, state.sum, distance);
    if (lane_ == 0) c_.shared.bounds[u][part] = make_float2(state.max, state.sum);
  }

  /// Of all its parts, and the step's own key and value, the unit's attention: published.
  __device__ __forceinline__ void merge(const Unit& unit, int u, float newest, int layer,
                                        const Probe<kProbes>& probe) const {
    const int count = min((unit.keys + 63) / 64, kWarps);
    float2 bound[kWarps], part[kWarps];  // maximum and sum; outputs 2 lane, 2 lane + 1
    float largest = newest;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      bound[w] = w < count ? c_.shared.bounds[u][w] : make_float2(-INFINITY, 0.0f);
      part[w] = w < count ? reinterpret_cast<const float2*>(output(u, w))[lane_] : make_float2(0.0f, 0.0f);
      largest = fmaxf(largest, bound[w].x);
    }
    const float offset = largest == -INFINITY ? 0.0f : largest;
    float sum = ptx::exp2_approx(newest - offset);
    const float2 v = unit.newest >= 0 ? unpack2<T>(words(u, 2)[lane_]) : make_float2(0.0f, 0.0f);
    float lo = sum * v.x, hi = sum * v.y;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ptx::exp2_approx(bound[w].x - offset);
      sum += weight * bound[w].y;
      lo += weight * part[w].x;
      hi += weight * part[w].y;
    }
    probe.merged(u, offset + ptx::log2_approx(sum), newest, lane_);
    const float inverse = sum == 0.0f ? 0.0f : ptx::rcp_approx(sum);
    lo *= inverse;
    hi *= inverse;
    float x[8];  // lane's columns of its group of 32, four lanes a group
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from_lane = lane_ / 4 % 2 * 16 + 4 * i + lane_ % 4;
      x[2 * i] = __shfl_sync(~0u, lo, from_lane);
      x[2 * i + 1] = __shfl_sync(~0u, hi, from_lane);
    }
    if (lane_ < 8) {
      step::store_b128(c_.attention() + place_of(unit.row, lane_ / 4, kDim / 32) + lane_ % 4 * 16,
                       vector_of<T>(x, phase_of(layer)));
    }
  }

  const Cta& c_;
  int warp_, lane_;
  uint32_t key_offset_, value_offset_;  // where this lane points ldmatrix
  float scale_;
};

}  // namespace vivace::mesh
