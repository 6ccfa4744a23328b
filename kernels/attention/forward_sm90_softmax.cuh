// Scores to probabilities in the registers of the sm90 forward kernel's consumers: masks and the online softmax.
#pragma once

#include "kernels/attention/forward_sm90_tile.cuh"

namespace vivace::sm90 {

/// ex2.approx
__device__ __forceinline__ float exp2_sfu(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack(float lo, float hi, __nv_bfloat16) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ uint32_t pack(float lo, float hi, __half) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

/// The online softmax of one thread's two rows (lane / 4 and lane / 4 + 8 of its warp's 16). It works in two parts, and
/// does not touch the output.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};  // what the exponentials are relative to; 2^8 below the true maximum at most
  float sum[2] = {0.0f, 0.0f};            // of this thread's columns only

  /// Takes in the maxima of a block of scores. Returns whether a row's grew, and then by what output and sum are rescaled.
  /// 2^8 of growth is let through: probabilities up to 256 are as precise, and the sum is in fp32. Until then no row asks
  /// the other threads that share it.
  template <bool kFirst, int kCount>
  __device__ __forceinline__ bool take_maxima(const float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
    float block_max[2];
    maxima(s, block_max);
    if constexpr (kFirst) {
#pragma unroll
      for (int r = 0; r < 2; ++r) max[r] = row_max(block_max[r]);
      return false;
    } else {
      const bool grew[2] = {(block_max[0] - max[0]) * scale_log2 > 8.0f, (block_max[1] - max[1]) * scale_log2 > 8.0f};
      if (!__any_sync(0xffffffffu, grew[0] || grew[1])) return false;
      raise(block_max, grew, scale_log2, rescale);
      return true;
    }
  }

  /// Scores to probabilities, as the A operand of the product with V.
  template <typename Element, int kCount>
  __device__ __forceinline__ void exponentiate(const float (&s)[kCount], float scale_log2, uint32_t (*p)[4]) {
    const float m0 = max[0] == -INFINITY ? 0.0f : max[0] * scale_log2;
    const float m1 = max[1] == -INFINITY ? 0.0f : max[1] * scale_log2;
    float partial[2];
    exponentiate_from<Element>(s, scale_log2, m0, m1, p, partial);
    sum[0] += partial[0];
    sum[1] += partial[1];
  }

  /// The same for a block that every row sees whole and that is not its first, without its maxima: only where a thread's
  /// probabilities add up to more than 2^8 is the block looked at again. Returns whether it was, and then by what the output
  /// is rescaled.
  template <typename Element, int kCount>
  __device__ __forceinline__ bool exponentiate_unseen(const float (&s)[kCount], float scale_log2, uint32_t (*p)[4],
                                                      float (&rescale)[2]) {
    float partial[2];
    // A row that has seen nothing yet has a maximum of -inf, so a sum of +inf or NaN.
    exponentiate_from<Element>(s, scale_log2, max[0] * scale_log2, max[1] * scale_log2, p, partial);
    const bool large[2] = {!(partial[0] <= 256.0f), !(partial[1] <= 256.0f)};  // NaN is
    if (__any_sync(0xffffffffu, large[0] || large[1])) {
      float block_max[2];
      maxima(s, block_max);
      raise(block_max, large, scale_log2, rescale);
      exponentiate<Element>(s, scale_log2, p);
      return true;
    }
    sum[0] += partial[0];
    sum[1] += partial[1];
    return false;
  }

 private:
  /// Of this thread's columns.
  template <int kCount>
  __device__ __forceinline__ static void maxima(const float (&s)[kCount], float (&block_max)[2]) {
    block_max[0] = s[0];
    block_max[1] = s[2];
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      block_max[0] = fmaxf(block_max[0], fmaxf(s[i], s[i + 1]));
      block_max[1] = fmaxf(block_max[1], fmaxf(s[i + 2], s[i + 3]));
    }
  }

  /// Over the four threads of a row.
  __device__ __forceinline__ static float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }

  /// Takes in the maxima of the rows that are `due` in one of their threads. Other rows keep theirs, so that their bits do
  /// not depend on the rows beside them.
  __device__ __forceinline__ void raise(const float (&block_max)[2], const bool (&due)[2], float scale_log2,
                                        float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t threads = __ballot_sync(0xffffffffu, due[r]) >> (threadIdx.x & 28);
      const float all = row_max(block_max[r]), before = max[r];
      if (threads & 15) max[r] = fmaxf(before, all);
      rescale[r] = max[r] == -INFINITY ? 1.0f : exp2_sfu((before - max[r]) * scale_log2);
      sum[r] *= rescale[r];
    }
  }

  template <typename Element, int kCount>
  __device__ __forceinline__ static void exponentiate_from(const float (&s)[kCount], float scale_log2, float m0, float m1,
                                                           uint32_t (*p)[4], float (&partial)[2]) {
    partial[0] = partial[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; i += 8) {
      float e[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) e[j] = exp2_sfu(fmaf(s[i + j], scale_log2, (j & 2) ? -m1 : -m0));
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        partial[0] += e[j] + e[j + 1];
        partial[1] += e[j + 2] + e[j + 3];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) p[i / 8][j] = pack(e[2 * j], e[2 * j + 1], Element{});
    }
  }
};

/// Hides keys that a row must not see. `column` is the first key of the block, `row` this thread's first query row. A thread
/// has 2 columns of every 8, at most 32 a row: what a row sees is one word, whatever the mask.
template <typename Traits>
__device__ __forceinline__ void mask_block(float (&s)[Traits::keys / 2], const ForwardArgs& args, const Tile<Traits>& tile,
                                           int row, int column) {
  static_assert(Traits::keys <= 128);
  column += 2 * (static_cast<int>(threadIdx.x) & 3);
  // Bits of this thread's columns before key `end`.
  auto columns_before = [&](int end) {
    end = min(max(end - column, 0), Traits::keys);
    return static_cast<uint32_t>((uint64_t{1} << (end / 8 * 2 + min(end % 8, 2))) - 1);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int begin, end;
    tile.visible(args, row + 8 * r, begin, end);
    const uint32_t seen = columns_before(end) & ~columns_before(begin);
#pragma unroll
    for (int j = 0; j < Traits::keys / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if ((seen & (1u << (2 * j + c))) == 0) s[4 * j + 2 * r + c] = -INFINITY;
      }
    }
  }
}

}  // namespace vivace::sm90
