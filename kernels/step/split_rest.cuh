// What the head's tiles leave over: T3's 8194 speech ids are two more than 64 CTAs' tiles, and a tile for two would take as
// long as one for 128.
#pragma once

#include "kernels/step/split_parts.cuh"

namespace vivace::split {

/// By two warps of each CTA that multiplies, a row and a feature at a time. They have nothing to do before the last norm.
template <typename T, typename S>
__device__ __forceinline__ void multiply_rest(const ProductCta<S>& c, int warp, int lane) {
  using L = Layout<S::heads>;
  const StepParams& p = c.args.p;
  const int rest = c.rest();
  if (rest == 0) return;
  const uint32_t each = (2 * static_cast<uint32_t>(p.layers) + 1) * S::workers;  // a launch counts
  for (int part = 0; part < S::parts; ++part) {
    wait_counter(c.counter(Counters::x + part), (c.shared.before[part] + 1) * each);
    for (int i = 2 * c.cta + warp; i < c.rows_of(part) * rest; i += 2 * S::products) {
      const int row = i / rest;
      const int64_t feature = p.vocab - rest + i % rest;
      const T* w = static_cast<const T*>(p.head) + feature * S::hidden;
      const float* squares = c.template at<const float>(part, L::squares) + row * S::workers;
      float sum = 0.0f, square = 0.0f;
      for (int k = 8 * lane; k < S::hidden; k += 256) {
        float a[8], b[8];
        unpack_vector<T>(__ldcg(reinterpret_cast<const uint4*>(c.template eight<const T>(part, L::x, row, k))), a);
        unpack_vector<T>(*reinterpret_cast<const uint4*>(w + k), b);
#pragma unroll
        for (int d = 0; d < 8; ++d) sum += a[d] * b[d];
      }
      for (int k = 4 * lane; k < S::workers; k += 128) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(squares + k));
        square += (four.x + four.y) + (four.z + four.w);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(~0u, sum, distance);
        square += __shfl_xor_sync(~0u, square, distance);
      }
      const float inverse = rsqrtf(square * (1.0f / S::hidden) + p.eps);
      if (lane == 0) p.logits[(part * c.most() + row) * p.vocab + feature] = sum * inverse;
    }
  }
}

}  // namespace vivace::split
