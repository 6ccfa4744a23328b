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

/// o += P V of kSteps * 16 keys for V that has elements which are not finite, without the mma: a key reaches only rows whose
/// probability of it is not 0. p: A fragments of kFragsM * 16 rows; tile: V's rows of these keys, swizzled, complete. By one
/// warp. Slow.
template <typename T, int kDim, int kFragsM, int kSteps>
__device__ __forceinline__ void multiply_visible_values(float (&o)[kFragsM][kDim / 8][4],
                                                        const uint32_t (&p)[kSteps][kFragsM][4], uint32_t tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int j = 0; j < 16 * kSteps; ++j) {
    float p_j[kFragsM][2];  // of rows lane / 4 and lane / 4 + 8: in a register of lane j % 8 / 2 of the four
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t x = 0;  // by masks: selects would become an array in memory
#pragma unroll
        for (int k = 0; k < 2 * kSteps; ++k) x |= p[k / 2][m][2 * (k % 2) + r] & ptx::opaque(k == j / 8 ? 0xffffffffu : 0u);
        const float2 pair = unpack2<T>(__shfl_sync(0xffffffffu, x, j % 8 / 2, 4));
        p_j[m][r] = j % 2 != 0 ? pair.y : pair.x;
      }
    }
#pragma unroll
    for (int f = 0; f < kDim / 8; ++f) {
      const float2 x = unpack2<T>(ptx::ld_shared(tile + Swizzle<kDim>::offset(j, f) + 4 * (lane % 4)));
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (p_j[m][r] == 0.0f) continue;
          o[m][f][2 * r] = fmaf(p_j[m][r], x.x, o[m][f][2 * r]);
          o[m][f][2 * r + 1] = fmaf(p_j[m][r], x.y, o[m][f][2 * r + 1]);
        }
      }
    }
  }
}

}  // namespace vivace
