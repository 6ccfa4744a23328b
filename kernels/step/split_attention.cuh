// Attention of the split step: a warpgroup takes one unit, a row and a head, at a time.
//
// A stage of the ring holds 64 keys and their values; warp w of the four has keys 16 w ... 16 w + 15 of it. Their products
// are mma.sync's, of which the keys or the dimensions of V are the 16 rows. Eight keys' pieces of 16 bytes with the same
// dimensions lie in the same banks, so a matrix of ldmatrix has of key r the piece c ^ r, whose dimensions are not the same:
// of the eight columns that a product has anyway, column n takes q's piece c ^ n, and the scores are the diagonal, which 8
// lanes hold. In the second product column n takes key n's probability alone, and adds up the pieces c ^ n of its values. So
// a column, eight of which a warp has, is a softmax of its own; they are merged in a fixed order at the end, so what a row
// computes depends on its own length alone. A fifth warp, the courier, brings q and the newest key and value, and takes the
// states.
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
        scale_(c.args.p.softmax_scale * 1.4426950408889634f),
        keys_at_((16 * warp + lane / 8 % 2 * 8 + lane % 8) * 128 + (lane / 16 ^ lane % 8) * 16),
        values_at_(kStageBytes / 2 + (16 * warp + lane / 16 * 8 + lane % 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16) {}

  /// All units of this warpgroup.
  __device__ __forceinline__ void run() {
    const int slots = S::parts * static_cast<int>(c_.args.p.layers);
    Position ring, next;
    for (;; ++turn_) {
      const Unit u = c_.take(group_, next);
      if (u.slot == slots) return;
      part_ = u.slot % S::parts;
      unit(c_.shared.rows[part_][u.place], u.head, u.slot / S::parts, ring);
    }
  }

 private:
  /// Of the columns of a warp: the maxima and sums of column n are lane 4 n + n / 2's, of the others -inf and 0.
  struct Columns {
    float max = -INFINITY, sum = 0.0f;
    float out[4][4] = {};  // [j]: pieces 2 j ^ n, dimension lane / 4, n = 2 (lane % 4) + {0, 1}; and pieces (2 j + 1) ^ n
  };
  /// Of columns 2 (lane % 4) and 2 (lane % 4) + 1, what their lanes have.
  __device__ __forceinline__ float2 of_columns(float x) const {
    return make_float2(__shfl_sync(~0u, x, 9 * (lane_ % 4)), __shfl_sync(~0u, x, 9 * (lane_ % 4) + 4));
  }
  static __device__ __forceinline__ void rescale(Columns& state, float2 by) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      state.out[j][0] *= by.x;
      state.out[j][1] *= by.y;
      state.out[j][2] *= by.x;
      state.out[j][3] *= by.y;
    }
  }
  /// Whether a column's scores are this lane's, and which: of a pair the second.
  __device__ __forceinline__ bool has_scores() const { return lane_ % 4 == lane_ / 8; }
  __device__ __forceinline__ bool is_odd() const { return lane_ / 4 % 2; }

  __device__ __forceinline__ void unit(const Row& unit, int head, int layer, Position& ring) {
    const int set = turn_ % 2;
    int keys = unit.keys;  // that are left
    Stages stages;
    load(stages, keys, ring);  // the ring goes on while q is not there
    barrier_wait(&c_.shared.begin[group_][set], turn_ / 2 % 2);
    const uint32_t fresh = ptx::shared_address(c_.shared.fresh[group_][set]);  // (3, 64): q, newest key, newest value
    uint32_t q[8];  // of piece i ^ n of column n = lane / 4, two dimensions
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = ptx::ld_shared(fresh + (i ^ lane_ / 4) * 16 + lane_ % 4 * 4);

    Columns state;
    if (warp_ == 0 && unit.newest >= 0) {
      const float score = dot(ptx::ld_shared_v4(fresh + lane_ % 8 * 16), ptx::ld_shared_v4(fresh + 128 + lane_ % 8 * 16));
      if (lane_ == 0) state.max = score * scale_, state.sum = 1.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = ptx::ld_shared(fresh + 256 + i * 16 + lane_ / 8 * 4);
        const float2 v = unpack2<T>(pair);
        if (lane_ % 4 == 0) state.out[i / 2][i % 2 * 2] = is_odd() ? v.y : v.x;
      }
    }
    for (; keys > 64; keys -= 128) {
      multiply<2>(state, q, stages, keys);
      load(stages, keys - 128, ring);
    }
    if (keys > 0) multiply<1>(state, q, stages, keys);

    store(state, c_.shared.merged[group_][set] + warp_ * State::kFloats);
    probe(unit, head, layer);
    sm90::barrier_arrive(&c_.shared.end[group_][set]);  // the rest is the courier's
  }

  /// This warp's keys and values of two stages, as operands of the products.
  struct Stages {
    uint32_t k[2][4][4], v[2][4][4];
  };
  /// The next two stages, as far as there are `keys`; the ring has them back at once, so that there is always something to
  /// read from memory.
  __device__ __forceinline__ void load(Stages& stages, int keys, Position& ring) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (keys <= 64 * i) return;
      const uint32_t address = ptx::shared_address(c_.ring + (group_ * S::attention_stages + ring.slot) * kStageBytes);
      barrier_wait(&c_.shared.full[group_][ring.slot], ring.parity);
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::ldmatrix_x4(stages.k[i][j], (address + keys_at_) ^ (32 * j));
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::ldmatrix_x4_trans(stages.v[i][j], (address + values_at_) ^ (32 * j));
      __syncwarp();
      if (lane_ == 0) sm90::barrier_arrive(&c_.shared.empty[group_][ring.slot]);
      ring.next(S::attention_stages);
    }
  }

  /// kCount stages, with keys of a row in the first `keys` places.
  template <int kCount>
  __device__ __forceinline__ void multiply(Columns& state, const uint32_t (&q)[8], Stages& stages, int keys) const {
    float score[2 * kCount];  // of keys 16 warp + lane / 4 + 8 (i % 2) of stage i / 2, if has_scores()
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float s[2][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::mma_m16n8k16<T>(s[j % 2], stages.k[i][j], q[2 * j], q[2 * j + 1]);
      score[2 * i] = is_odd() ? s[0][1] + s[1][1] : s[0][0] + s[1][0];
      score[2 * i + 1] = is_odd() ? s[0][3] + s[1][3] : s[0][2] + s[1][2];
    }

    float largest = state.max;
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const bool is_key = has_scores() && i / 2 * 64 + 16 * warp_ + i % 2 * 8 + lane_ / 4 < keys;
      score[i] = is_key ? score[i] * scale_ : -INFINITY;  // whatever the stage held before
      largest = fmaxf(largest, score[i]);
    }
    const float offset = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet: not -inf - -inf
    const float by = ptx::exp2_approx(state.max - offset);
    state.max = largest;
    state.sum *= by;
    rescale(state, of_columns(by));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t e = pack2<T>(ptx::exp2_approx(score[2 * i] - offset), ptx::exp2_approx(score[2 * i + 1] - offset));
      const float2 rounded = unpack2<T>(e);
      state.sum += rounded.x + rounded.y;
      const int here = keys - i * 64 - 16 * warp_;
      if (here < 16) {  // values past the end: whatever the stage held before
        const int first = 2 * (lane_ % 4);
        const auto mask = [&](int key) { return (key < here ? 0xffffu : 0u) | (key + 1 < here ? 0xffff0000u : 0u); };
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          stages.v[i][j][0] &= mask(first);
          stages.v[i][j][1] &= mask(first);
          stages.v[i][j][2] &= mask(first + 8);
          stages.v[i][j][3] &= mask(first + 8);
        }
      }
      const uint32_t low = is_odd() ? e << 16 : e & 0xffff, high = is_odd() ? e & 0xffff0000 : e >> 16;
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::mma_m16n8k16<T>(state.out[j], stages.v[i][j], low, high);
    }
  }

  /// The columns as one state: 64 floats, maximum, sum.
  __device__ __forceinline__ void store(Columns& state, float* to) const {
    const float2 max = of_columns(state.max), sum = of_columns(state.sum);
    float largest = fmaxf(max.x, max.y);
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const float offset = largest == -INFINITY ? 0.0f : largest;
    const float2 by = make_float2(ptx::exp2_approx(max.x - offset), ptx::exp2_approx(max.y - offset));
    float total = sum.x * by.x + sum.y * by.y;
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    rescale(state, by);
    float piece[8];  // of piece i ^ 2 (lane % 4)
#pragma unroll
    for (int i = 0; i < 8; ++i) piece[i] = state.out[i / 2][i % 2 * 2] + state.out[i / 2][2 - i % 2 * 2 + 1];
    float pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = piece[i / 2 * 4 + i % 2] + __shfl_xor_sync(~0u, piece[i / 2 * 4 + i % 2 + 2], 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[(i + 2 * (lane_ % 4)) * 8 + lane_ / 4] = pair[i] + __shfl_xor_sync(~0u, pair[i + 2], 2);
    }
    if (lane_ == 0) to[State::kMax] = largest, to[State::kSum] = total;
  }

  /// Of 64 dimensions, eight lanes with eight each.
  static __device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
    float x[8], y[8], s = 0.0f;
    unpack_vector<T>(a, x);
    unpack_vector<T>(b, y);
#pragma unroll
    for (int d = 0; d < 8; ++d) s += x[d] * y[d];
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) s += __shfl_xor_sync(~0u, s, distance);
    return s;
  }

  /// Writes the row's probabilities where somebody asks for this head.
  __device__ __forceinline__ void probe(const Row& unit, int head, int layer) const {
    const StepParams& p = c_.args.p;
    if (p.probes == nullptr) return;
    const uint4* fresh = c_.shared.fresh[group_][turn_ % 2] + lane_ % 8;
    for (int i = 0; i < static_cast<int>(p.probe_count); ++i) {
      if (p.probe_layer[i] != layer || p.probe_head[i] != head) continue;
      sm90::named_barrier_sync(2 + group_, 128);
      const step::SoftmaxOutput o(c_.shared.merged[group_][turn_ % 2], lane_);
      const float offset = o.offset, inverse = o.sum == 0.0f ? 0.0f : 1.0f / o.sum;
      const T* k = static_cast<const T*>(p.k_cache) + layer * p.k_stride[0] + unit.cache_row * p.k_stride[1] +
                   head * p.k_stride[3] + lane_ % 8 * 8;
      float* to = p.probes + (i * p.probe_rows + part_ * c_.most() + unit.row) * p.probe_capacity;
      const int seen = unit.newest >= 0 ? unit.newest + 1 : unit.keys;
      for (int64_t first = 0; first < p.probe_capacity; first += 16) {
        const int64_t key = first + 4 * warp_ + lane_ / 8;
        uint4 x = {};
        if (key < seen) x = key == unit.newest ? fresh[8] : __ldcg(reinterpret_cast<const uint4*>(k + key * 64));
        const float s = dot(fresh[0], x) * scale_;
        if (lane_ % 8 == 0 && key < p.probe_capacity) to[key] = key < seen ? ptx::exp2_approx(s - offset) * inverse : 0.0f;
      }
    }
  }

  const AttentionCta<S>& c_;
  int group_, warp_, lane_, part_ = 0;
  float scale_;
  uint32_t keys_at_, values_at_;  // of this lane's row of a matrix, in a stage
  int turn_ = 0;                  // units of this warpgroup before this one
};

}  // namespace vivace::split
