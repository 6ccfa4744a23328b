// RMSNorm (arXiv 1910.07467), optionally of a residual sum. One CTA a row; each thread keeps its first 16 bytes in
// registers, so that rows up to 1024 vectors (8192 elements of 16 bits) are read once.
#include "kernels/common/vector.cuh"
#include "kernels/norm/rms_norm_launch.h"

namespace vivace {
namespace {

/// The sum of x over the CTA, in a fixed order, on every thread. `partial` has a slot for each warp.
__device__ __forceinline__ float block_sum(float x, float* partial) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
  __syncthreads();  // the slots are used again for the next row
  return sum;
}

/// kN elements of the row at column c, after the residual add; `write` puts the sum back.
template <typename T, int kN>
__device__ __forceinline__ void load_row(const T* x, T* residual, int64_t c, bool write, float (&value)[kN]) {
  if (residual == nullptr) {
    load_vector<kN>(x + c, value);
    return;
  }
  load_vector<kN>(residual + c, value);
  if (!write) return;  // already summed
  float add[kN];
  load_vector<kN>(x + c, add);
#pragma unroll
  for (int i = 0; i < kN; ++i) value[i] = to_float(from_float<T>(value[i] + add[i]));
  store_vector<kN>(residual + c, value);
}

template <typename T, int kN>
__global__ void __launch_bounds__(1024) rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  __shared__ float partial[32];
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t step = int64_t{blockDim.x} * kN;
  const int64_t first = int64_t{threadIdx.x} * kN;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* residual = p.residual == nullptr ? nullptr : static_cast<T*>(p.residual) + row * p.residual_stride;
    T* out = static_cast<T*>(p.out) + row * p.width;

    float sum = 0.0f;
    float kept[kN];  // the thread's first vector
    for (int64_t c = first; c < p.width; c += step) {
      float value[kN];
      load_row<T, kN>(x, residual, c, true, value);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        sum += value[i] * value[i];
        if (c == first) kept[i] = value[i];
      }
    }
    const float scale = 1.0f / sqrtf(block_sum(sum, partial) / static_cast<float>(p.width) + p.eps);
    for (int64_t c = first; c < p.width; c += step) {
      float value[kN], w[kN];
      if (c == first) {
#pragma unroll
        for (int i = 0; i < kN; ++i) value[i] = kept[i];
      } else {
        load_row<T, kN>(x, residual, c, false, value);
      }
      load_vector<kN>(weight + c, w);
#pragma unroll
      for (int i = 0; i < kN; ++i) value[i] = value[i] * scale * w[i];
      store_vector<kN>(out + c, value);
    }
  }
}

template <typename T, int kN>
cudaError_t launch(const RmsNormParams& p, cudaStream_t stream) {
  const int64_t vectors = ceil_div(p.width, kN);
  const unsigned threads = static_cast<unsigned>(vectors >= 1024 ? 1024 : ceil_div(vectors, 32) * 32);
  rms_norm_kernel<T, kN><<<grid_x(p.rows), threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm_cuda(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  const int64_t size = size_of(p.dtype);
  const bool vectors = is_aligned_16(p.x) && is_aligned_16(p.residual) && is_aligned_16(p.weight) && is_aligned_16(p.out) &&
                       are_aligned_16({p.x_stride, p.residual_stride, p.width}, size);
  return for_float_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return vectors ? launch<T, kVector<T>>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace vivace
