// Rotary position embedding of (tokens, heads, head_dim). A CTA takes 128 items of a token; consecutive CTAs take
// consecutive parts, so that a token's heads are read as one stretch.
#include "kernels/rotary/rotary_launch.h"
#include "kernels/rotary/rotate.cuh"

namespace vivace {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ int64_t position_of(const RotaryParams& p, int64_t token) {
  if (p.positions == nullptr) return p.seqlen > 0 ? token % p.seqlen : token;
  return p.position_dtype == DType::kInt64 ? static_cast<const int64_t*>(p.positions)[token]
                                           : static_cast<const int32_t*>(p.positions)[token];
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ RotaryParams p, const __grid_constant__ RotaryTables tables, int items,
                  int64_t parts) {
  for (int64_t block = blockIdx.x; block < p.tokens * parts; block += gridDim.x) {
    const int64_t token = block / parts;
    const int i = static_cast<int>(block - token * parts) * kThreads + static_cast<int>(threadIdx.x);
    const int head = i / items;
    if (head >= p.heads) continue;
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride[0] + head * p.x_stride[1];
    T* out = static_cast<T*>(p.out) + token * p.out_stride[0] + head * p.out_stride[1];
    rotate_item<T, kN>(tables, x, out, i - head * items, position_of(p, token));
  }
}

template <typename T, int kN>
cudaError_t launch(const RotaryParams& p, cudaStream_t stream) {
  const RotaryTables tables{
      p.cos, p.sin, p.table_dtype == DType::kFloat32, p.interleaved, static_cast<int>(p.rotary_dim / 2), p.max_position};
  const bool in_place = p.x == p.out && p.x_stride[0] == p.out_stride[0] && p.x_stride[1] == p.out_stride[1];
  const int head_dim = static_cast<int>(in_place ? p.rotary_dim : p.head_dim);  // what is not rotated stays where it is
  const int items = rotary_items<kN>(head_dim, tables.half);
  if (items == 0) return cudaSuccess;
  const int64_t parts = ceil_div(p.heads * items, kThreads);
  rotary_kernel<T, kN><<<grid_x(p.tokens * parts), kThreads, 0, stream>>>(p, tables, items, parts);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rotary_cuda(const RotaryParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.heads == 0 || p.head_dim == 0) return cudaSuccess;
  const int vector = static_cast<int>(16 / size_of(p.dtype));
  const bool vectors = rotary_takes_vectors(p.head_dim, p.rotary_dim, vector) && is_aligned_16(p.x) &&
                       is_aligned_16(p.out) && is_aligned_16(p.cos) && is_aligned_16(p.sin) &&
                       are_aligned_16({p.x_stride[0], p.x_stride[1], p.out_stride[0], p.out_stride[1]}, size_of(p.dtype));
  return for_float_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return vectors ? launch<T, kVector<T>>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace vivace
