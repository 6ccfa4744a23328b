// The residual stream of the mesh step: CTA (g, j) keeps rows g, g + 16, ... of column block j.
#pragma once

#include "kernels/step/mesh_vector.cuh"
#include "kernels/step/table.cuh"

namespace vivace::mesh {

/// Two neighbours of `from`, as fp32.
template <typename T>
__device__ __forceinline__ float2 pair_of(const T* from) {
  return unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
}

/// What a row begins with.
template <typename T>
struct Embedding {
  const T *token, *position;

  __device__ __forceinline__ Embedding(const Cta& c, int row) {
    const StepParams& p = c.args.p;
    const int64_t request = clamp_index(p.row_request[row], p.requests);
    token = static_cast<const T*>(p.speech_emb) + clamp_index(p.tokens[request], p.speech_tokens) * kHidden;
    position = static_cast<const T*>(p.speech_pos_emb) + clamp_index(p.positions[request], p.speech_positions) * kHidden;
  }

  /// A lane's 8 of the 32 columns of `group`.
  __device__ __forceinline__ void load(int group, int lane, float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int column = 32 * group + column_of(lane, i);
      const float2 a = pair_of(token + column), b = pair_of(position + column);
      x[i] = to_float(from_float<T>(a.x + b.x));
      x[i + 1] = to_float(from_float<T>(a.y + b.y));
    }
  }
};

/// Where partial sums of `out` and `down` of a row and a column block lie: of either half of the columns those of 16
/// sources, of a source one group of columns and then the other. So the bytes that a warp of Residual reads at a time lie in
/// a row.
inline constexpr int kSumsPitch = kGroups * kColumns * 2, kSumsHalf = kSumsPitch / 2;
__device__ __forceinline__ int place_of_sums(int block, int row, int source) {
  return (block * kMaxRows + row) * kSumsPitch + source % 4 * 512 + source / 4 * 128;
}

/// What the 16 senders of a row say of its squares: a lane's quarter. And of all 16, 1 / rms of the row.
__device__ __forceinline__ const uint8_t* squares_of(const Cta& c, int row, int lane) {
  return c.at<uint8_t>(Layout::squares) + place_of(row, 0, 1) + lane % 4 * 16;
}
__device__ __forceinline__ uint32_t wrong_phase(const uint4& v, uint32_t phase) {
  return (v.x ^ phase) | (v.y ^ phase) | (v.z ^ phase) | (v.w ^ phase);
}
__device__ __forceinline__ float inverse_rms(const uint4& v, float eps) {
  float sum = (__uint_as_float(v.x) + __uint_as_float(v.y)) + (__uint_as_float(v.z) + __uint_as_float(v.w));
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  return rsqrtf(sum * (1.0f / kHidden) + eps);
}

/// Two warps have a row. A lane has 8 of 32 columns, and of 16 sources of a sum a quarter.
template <typename T>
class Residual {
 public:
  __device__ __forceinline__ Residual(const Cta& c, int warp, int lane, float (&x)[8])
      : c_(c), x_(x), lane_(lane), half_(warp % 2), group_(2 * half_ + lane / 4 % 2), row_(c.group + kGroups * (warp / 2)) {}

  /// Before half layer i, or the head: what the row begins with, or the sums of `out` or `down` added; then publishes what
  /// is multiplied next, x * gain, and the sum of its squares.
  __device__ __forceinline__ void publish(const void* gains, int i, bool is_last) const {
    if (row_ >= c_.rows) return;
    const T* gain = static_cast<const T*>(gains) + kColumns * c_.block + 32 * group_;
    float2 g[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) g[k] = pair_of(gain + column_of(lane_, 2 * k));
    uint8_t* to =
        c_.at<uint8_t>(Layout::x) + place_of(row_, kColumns / 32 * c_.block + group_, kHidden / 32) + lane_ % 4 * 16;
    uint8_t* squares_to = c_.at<uint8_t>(Layout::squares) + place_of(row_, 0, 1) + 4 * (2 * c_.block + half_);
    if (i == 0) {
      Embedding<T>(c_, row_).load(kColumns / 32 * c_.block + group_, lane_, x_);
      // the other phase than before the head, which is written once a step
      if (lane_ < 8) step::store_b128(to + Layout::head_x, make_uint4(kHeadPhase ^ 1, 0, 0, 0));
      if (lane_ == 0) store_relaxed(squares_to + Layout::head_squares, kHeadPhase ^ 1);
    } else {
      add(i % 2 == 1 ? kOutPhase : kDownPhase);
    }
    const uint32_t phase = is_last ? kHeadPhase : i % 2 == 1 ? kMiddlePhase : kFirstPhase;
    float scaled[8], squares = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      squares += x_[k] * x_[k];
      scaled[k] = x_[k] * (k % 2 == 0 ? g[k / 2].x : g[k / 2].y);
    }
    if (lane_ < 8) step::store_b128(to + (is_last ? Layout::head_x : 0), vector_of<T>(scaled, phase));
#pragma unroll
    for (int distance = 1; distance <= 4; distance *= 2) squares += __shfl_xor_sync(~0u, squares, distance);
    if (lane_ == 0) store_relaxed(squares_to + (is_last ? Layout::head_squares : 0), with_phase(squares, phase));
    __syncwarp();
  }

 private:
  /// Adds the sums of `out` or `down`, of that phase.
  __device__ __forceinline__ void add(uint32_t phase) const {
    constexpr int kPerLane = kGroups / 4;  // lanes 8 q to 8 q + 7 have sources 4 q to 4 q + 3
    const uint8_t* from =
        opaque(c_.at<uint8_t>(Layout::sums) + place_of_sums(c_.block, row_, 0) + half_ * kSumsHalf + lane_ * 16);
    Parts<T, kPerLane> parts(phase);
    step::Watchdog<kTurns> watchdog;
    do {
      watchdog.check();
      parts.load(from, 512, phase);
    } while (__any_sync(~0u, parts.wrong(phase) & 1));
    float sum[8];
    parts.add_up(sum);
#pragma unroll
    for (int distance = 8; distance <= 16; distance *= 2) {
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += __shfl_xor_sync(~0u, sum[k], distance);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) x_[k] += sum[k];
  }

  const Cta& c_;
  float (&x_)[8];
  int lane_, half_, group_, row_;
};

}  // namespace vivace::mesh
