// Keeps NaN and infinities of V from rows that do not see them: a hidden key has probability 0, but 0 * NaN is NaN.
#pragma once

#include <cstdint>

#include "kernels/attention/swizzle.cuh"
#include "kernels/common/convert.cuh"

namespace vivace {

/// Bits 15 and 31 of the result: the low and the high element are NaN or infinite (all exponent bits set: adding one
/// carries).
template <typename T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair);
template <>
__device__ __forceinline__ uint32_t not_finite<__nv_bfloat16>(uint32_t pair) {
  return ((pair & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
}
template <>
__device__ __forceinline__ uint32_t not_finite<__half>(uint32_t pair) {
  return ((pair & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
}

/// sum + 0 * pair, element by element: +-0 as long as all pairs are finite.
template <typename T>
__device__ __forceinline__ uint32_t finite_sum(uint32_t pair, uint32_t sum);
template <>
__device__ __forceinline__ uint32_t finite_sum<__nv_bfloat16>(uint32_t pair, uint32_t sum) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}
template <>
__device__ __forceinline__ uint32_t finite_sum<__half>(uint32_t pair, uint32_t sum) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pair), "r"(0));
  return sum;
}

/// The pair with zeros for what is not finite.
template <typename T>
__device__ __forceinline__ uint32_t finite_part(uint32_t pair) {
  return pair & ~((not_finite<T>(pair) >> 15) * 0xffffu);
}

/// Adds p * v of those elements of V that are not finite to o, for rows whose p is not 0: with finite_part of V, the product
/// is then exact for every row. s: of kFragsM * 16 rows as accumulators; p = probability(s, m, r) in row r of fragment m;
/// tile: V's rows of these keys, swizzled, complete. By one warp. Slow.
template <typename T, int kDim, int kFragsM, int kFragsN, typename Probability>
__device__ __forceinline__ void add_values_not_finite(float (&o)[kFragsM][kDim / 8][4],
                                                      const float (&s)[kFragsM][kFragsN][4], uint32_t tile,
                                                      const Probability& probability) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int j = 0; j < 8 * kFragsN; ++j) {
    float p_j[kFragsM][2];  // of rows lane / 4 and lane / 4 + 8: in a register of lane j % 8 / 2 of the four
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t x = 0;  // by masks: selects would become an array in memory
#pragma unroll
        for (int f = 0; f < kFragsN; ++f) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            x |= __float_as_uint(s[m][f][2 * r + e]) & ptx::opaque(8 * f + e == (j & ~6) ? 0xffffffffu : 0u);
          }
        }
        p_j[m][r] = probability(__uint_as_float(__shfl_sync(0xffffffffu, x, j % 8 / 2, 4)), m, r);
      }
    }
#pragma unroll
    for (int f = 0; f < kDim / 8; ++f) {
      const uint32_t v = ptx::ld_shared(tile + Swizzle<kDim>::offset(j, f) + 4 * (lane % 4));
      const uint32_t v_bad = not_finite<T>(v);
      if (v_bad == 0) continue;
      const float2 x = unpack2<T>(v);
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (p_j[m][r] == 0.0f) continue;
          if (v_bad & 0x8000u) o[m][f][2 * r] += p_j[m][r] * x.x;
          if (v_bad & 0x80000000u) o[m][f][2 * r + 1] += p_j[m][r] * x.y;
        }
      }
    }
  }
}

}  // namespace vivace
