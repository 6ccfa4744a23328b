// silu(gate) * up of SwiGLU (arXiv 2002.05202). A CTA takes 256 vectors of a row; consecutive CTAs take consecutive parts.
#include "kernels/activation/silu_gate_launch.h"
#include "kernels/common/vector.cuh"

namespace vivace {
namespace {

constexpr int kThreads = 256;

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) silu_gate_kernel(const __grid_constant__ SiluGateParams p, int64_t parts) {
  for (int64_t block = blockIdx.x; block < p.rows * parts; block += gridDim.x) {
    const int64_t row = block / parts;
    const int64_t c = ((block - row * parts) * kThreads + threadIdx.x) * kN;
    if (c >= p.width) continue;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride + c;
    float gate[kN], up[kN];
    load_vector<kN>(x, gate);
    load_vector<kN>(x + p.width, up);
#pragma unroll
    for (int i = 0; i < kN; ++i) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    store_vector<kN>(static_cast<T*>(p.out) + row * p.width + c, gate);
  }
}

template <typename T, int kN>
cudaError_t launch(const SiluGateParams& p, cudaStream_t stream) {
  const int64_t parts = ceil_div(p.width, int64_t{kThreads} * kN);
  silu_gate_kernel<T, kN><<<grid_x(p.rows * parts), kThreads, 0, stream>>>(p, parts);
  return cudaGetLastError();
}

}  // namespace

cudaError_t silu_gate_cuda(const SiluGateParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  const bool vectors = is_aligned_16(p.x) && is_aligned_16(p.out) && are_aligned_16({p.x_stride, p.width}, size_of(p.dtype));
  return for_float_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return vectors ? launch<T, kVector<T>>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace vivace
