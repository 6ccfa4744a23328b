// Alignment probes of the mesh step: attention probabilities of single heads.
//
// The warps that attend leave the scores of a probed head in the probes' memory, and of each row log2 of the sum of their
// exponentials in shared memory. When the last probed layer of the CTA's head has been attended, the warps beside the one
// that streams make them probabilities; nobody waits for that. A step without probes does not have the code.
#pragma once

#include "kernels/step/mesh_parts.cuh"
#include "kernels/step/step_probe.cuh"

namespace vivace::mesh {

/// Makes powers of two of attention's scores.
__device__ __forceinline__ float score_scale(const Cta& c) { return c.args.p.softmax_scale * 1.4426950408889634f; }

/// Where the scores of a stage go.
template <bool kProbes>
struct ProbedScores {
  float* to = nullptr;
  int keys = 0;  // for which there is room

  /// Lane's scores of keys 8 j + lane / 4, -inf where there is no key; four lanes have the same.
  __device__ __forceinline__ void store(const float (&s)[8], int lane) const {
    if (to == nullptr) return;
    const int left = lane % 4 == 0 ? keys - lane / 4 : 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * j < left) to[8 * j + lane / 4] = s[j];
    }
  }
};
template <>
struct ProbedScores<false> {
  __device__ __forceinline__ void store(const float (&)[8], int) const {}
};

/// What attention of a layer does for the probes of the CTA's head.
template <bool kProbes>
class Probe {
 public:
  __device__ __forceinline__ Probe(const Cta& c, int layer)
      : c_(c), layer_(layer), index_(step::find_probe(c.args.p, layer, c.group)) {}

  /// Stage i of a unit.
  __device__ __forceinline__ ProbedScores<true> scores(const Unit& unit, int i) const {
    if (index_ < 0) return {};
    const int room = min(unit.keys, static_cast<int>(c_.args.p.probe_capacity));
    return {step::probe_row(c_.args.p, index_, unit.row) + 64 * i, room - 64 * i};
  }
  __device__ __forceinline__ void merged(int u, float log_sum, float newest, int lane) const {
    if (index_ >= 0 && lane == 0) c_.shared.probed[index_][u] = make_float2(log_sum, newest);
  }
  /// The layer is done; all lanes of all warps.
  __device__ __forceinline__ void attended() const {
    const StepParams& p = c_.args.p;
    bool is_last = index_ >= 0;
    for (int i = 0; i < static_cast<int>(p.probe_count); ++i) {
      is_last = is_last && (p.probe_head[i] != c_.group || p.probe_layer[i] <= layer_);
    }
    if (is_last) sm90::barrier_arrive(&c_.shared.attended);
  }

 private:
  const Cta& c_;
  int layer_, index_;
};
template <>
class Probe<false> {
 public:
  __device__ __forceinline__ Probe(const Cta&, int) {}
  __device__ __forceinline__ ProbedScores<false> scores(const Unit&, int) const { return {}; }
  __device__ __forceinline__ void merged(int, float, float, int) const {}
  __device__ __forceinline__ void attended() const {}
};

/// The rows' probes of the CTA's head. By threads 0 ... kBeside - 1 of those that neither attend nor stream.
class ProbeWriter {
 public:
  __device__ __forceinline__ ProbeWriter(const Cta& c, int thread)
      : c_(c),
        thread_(thread),
        count_(static_cast<int>(c.args.p.probe_count)),
        width_(static_cast<int>(c.args.p.probe_capacity)) {}

  __device__ __forceinline__ void run() const {
    bool any = false;
#pragma unroll 1
    for (int i = 0; i < count_; ++i) {
      if (c_.args.p.probe_head[i] != c_.group) continue;
      any = true;
      clear(i);
    }
    if (!any) return;
    step::barrier_wait<kTurns>(&c_.shared.attended, 0);
#pragma unroll 1
    for (int i = 0; i < count_; ++i) {
      if (is_same(i, i) && step::find_probe(c_.args.p, c_.args.p.probe_layer[i], c_.group) == i) write(i);
    }
  }

 private:
  static constexpr int kAtOnce = 8;  // loads of a thread

  /// Whether `probe` is of the CTA's head and of the layer of probe `other`.
  __device__ __forceinline__ bool is_same(int probe, int other) const {
    const StepParams& p = c_.args.p;
    return p.probe_head[probe] == c_.group && p.probe_layer[probe] == p.probe_layer[other];
  }

  /// Zeros behind the rows' keys.
  __device__ __forceinline__ void clear(int probe) const {
#pragma unroll 1
    for (int u = 0; u < c_.shared.unit_count; ++u) {
      const Unit unit = c_.shared.units[u];
      float* to = step::probe_row(c_.args.p, probe, unit.row);
      for (int key = unit.keys + (unit.newest >= 0 ? 1 : 0) + thread_; key < width_; key += kBeside) to[key] = 0.0f;
    }
  }

  /// Probabilities of the scores that `probe` has, to all probes of the same head and layer.
  __device__ __forceinline__ void write(int probe) const {
    const StepParams& p = c_.args.p;
    const float scale = score_scale(c_);
#pragma unroll 1
    for (int u = 0; u < c_.shared.unit_count; ++u) {
      const Unit unit = c_.shared.units[u];
      const float2 known = c_.shared.probed[probe][u];
      const int keys = min(unit.keys, width_);
      const float* from = step::probe_row(p, probe, unit.row);
#pragma unroll 1
      for (int first = thread_; first < keys; first += kAtOnce * kBeside) {
        float x[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int key = first + k * kBeside;
          x[k] = from[key < keys ? key : first];  // no thread reads what another one writes
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) x[k] = ptx::exp2_approx(x[k] * scale - known.x);
#pragma unroll 1
        for (int same = probe; same < count_; ++same) {
          if (!is_same(same, probe)) continue;
          float* to = step::probe_row(p, same, unit.row);
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (first + k * kBeside < keys) to[first + k * kBeside] = x[k];
          }
        }
      }
      if (thread_ != 0 || unit.newest < 0 || unit.newest >= width_) continue;
      for (int same = probe; same < count_; ++same) {
        if (is_same(same, probe)) step::probe_row(p, same, unit.row)[unit.newest] = ptx::exp2_approx(known.y - known.x);
      }
    }
  }

  const Cta& c_;
  int thread_, count_, width_;
};

}  // namespace vivace::mesh
