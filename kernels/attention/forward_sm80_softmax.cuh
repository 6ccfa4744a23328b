// Online softmax of the rows of one warp, over the scores of a step of keys.
#pragma once

#include <cmath>

#include "kernels/attention/softmax.cuh"

namespace vivace::sm80 {

/// State of this thread's rows: lane / 4 and lane / 4 + 8 of each of the warp's kFragsM fragments of 16 rows. Probabilities
/// are 2^(score * scale_log2 - offset), in which a row's offset is its maximum, or up to 8 below.
///
/// A step is taken in by see() or see_all(), rescale(), exponentiate().
template <int kFragsM>
struct WarpSoftmax {
  static constexpr float kUnseen = -3.402823466e38f;  // offset of a row that has seen no key: 2^(-inf - kUnseen) is 0

  float offset[kFragsM][2];  // the same in the four lanes of a row
  float sum[kFragsM][2];     // this lane's part of the row's denominator
  float seen[kFragsM][2];    // maximum of this lane's scores of the step at hand

  __device__ __forceinline__ WarpSoftmax() {
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        offset[m][r] = kUnseen;
        sum[m][r] = 0.0f;
      }
    }
  }

  /// Looks at fragment i of a step's kFragsM * kFragsS, all in turn. By asm, so that it stays where it stands: between mma.
  template <int kFragsS>
  __device__ __forceinline__ void see(const float (&s)[kFragsM][kFragsS][4], int i) {
    const int m = i / kFragsS, f = i % kFragsS;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (f == 0 && e % 2 == 0) {
        seen[m][e / 2] = s[m][f][e];
      } else {
        asm volatile("max.f32 %0, %0, %1;" : "+f"(seen[m][e / 2]) : "f"(s[m][f][e]));
      }
    }
  }

  /// Looks at a whole step.
  template <int kFragsS>
  __device__ __forceinline__ void see_all(const float (&s)[kFragsM][kFragsS][4]) {
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        seen[m][r] = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int f = 1; f < kFragsS; ++f) seen[m][r] = fmaxf(seen[m][r], fmaxf(s[m][f][2 * r], s[m][f][2 * r + 1]));
      }
    }
  }

  /// Moves the offsets of rows whose maximum grew by more than 2^8 and rescales sum and o; below, probabilities
  /// keep their relative precision. first: sum and o are zeros. Called by whole warps.
  template <int kFragsO>
  __device__ __forceinline__ void rescale(float (&o)[kFragsM][kFragsO][4], float scale_log2, bool first = false) {
    if (!__any_sync(0xffffffffu, grew(scale_log2))) return;  // joins the lanes of a row
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) seen[m][r] = quad_max(seen[m][r]);
    }
    raise(o, scale_log2, first);
  }

  /// Whether a score that this lane has seen is more than 2^8 beyond its row's offset.
  __device__ __forceinline__ bool grew(float scale_log2) const {
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) grew |= fmaf(seen[m][r], scale_log2, -offset[m][r]) > 8.0f;
    }
    return grew;
  }

  /// The same decision for each row, with what its four lanes have seen: other rows leave its bits as they are.
  template <int kFragsO>
  __device__ __forceinline__ void raise(float (&o)[kFragsM][kFragsO][4], float scale_log2, bool first) {
    float factor[kFragsM][2];
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float maximum = seen[m][r] * scale_log2, old_offset = offset[m][r];
        if (maximum - old_offset > 8.0f) offset[m][r] = maximum;
        factor[m][r] = ptx::exp2_approx(old_offset - offset[m][r]);
      }
    }
    if (first) return;
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) scale_row(o, m, r, factor[m][r]);
    }
  }

  /// Of a score in row r of fragment m.
  __device__ __forceinline__ float probability(float score, float scale_log2, int m, int r) const {
    return ptx::exp2_approx(fmaf(score, scale_log2, -offset[m][r]));
  }

  /// Columns 16 * j to 16 * j + 16 of fragment row m of a step become probabilities.
  template <int kFragsS>
  __device__ __forceinline__ void exponentiate(float (&s)[kFragsM][kFragsS][4], float scale_log2, int m, int j) {
#pragma unroll
    for (int f = 2 * j; f < 2 * j + 2; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[m][f][e] = probability(s[m][f][e], scale_log2, m, e / 2);
        sum[m][e / 2] += s[m][f][e];
      }
    }
  }

  /// As finish_row, of row r of fragment m.
  __device__ __forceinline__ float finish(int m, int r, float sink, float& factor) const {
    return finish_row(offset[m][r], sum[m][r], sink, factor);
  }

 private:
  template <int kFragsO>
  __device__ __forceinline__ void scale_row(float (&o)[kFragsM][kFragsO][4], int m, int r, float factor) {
    sum[m][r] *= factor;
#pragma unroll
    for (int f = 0; f < kFragsO; ++f) {
      o[m][f][2 * r] *= factor;
      o[m][f][2 * r + 1] *= factor;
    }
  }
};

}  // namespace vivace::sm80
