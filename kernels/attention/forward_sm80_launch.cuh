// Instantiates and launches the sm80 forward kernels of one head dimension. One head dimension a .cu file, so that they
// compile side by side.
#pragma once

#include "kernels/attention/forward_sm80.cuh"
#include "kernels/attention/forward_sm80_pipelined.cuh"

namespace vivace::sm80 {

template <typename T, int kDim, bool kRich>
cudaError_t launch_variant(const ForwardArgs& args, int threads, int shared_bytes, cudaStream_t stream) {
  void (*kernel)(ForwardArgs);
  if constexpr (ForwardTile<kDim, false>::kPipelined) {
    kernel = attention_forward_pipelined_kernel<T, kDim, kRich>;
  } else {
    kernel = attention_forward_kernel<T, kDim, kRich>;
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(args.order.tiles()));
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <int kDim>
cudaError_t launch_forward(ForwardArgs& args, bool rich, int64_t l2_bytes, bool small_sm, cudaStream_t stream) {
  using Config = ForwardTile<kDim, false>;
  static_assert(Config::kM == ForwardTile<kDim, true>::kM && Config::kThreads == ForwardTile<kDim, true>::kThreads);
  args.order = TileOrder(args.params, Config::kM, l2_bytes);
  if (args.order.tiles() > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int shared_bytes = small_sm ? kSharedBytes<kDim, true> : kSharedBytes<kDim, false>;
  if (args.params.dtype == DType::kBFloat16) {
    return rich ? launch_variant<__nv_bfloat16, kDim, true>(args, Config::kThreads, shared_bytes, stream)
                : launch_variant<__nv_bfloat16, kDim, false>(args, Config::kThreads, shared_bytes, stream);
  }
  return rich ? launch_variant<__half, kDim, true>(args, Config::kThreads, shared_bytes, stream)
              : launch_variant<__half, kDim, false>(args, Config::kThreads, shared_bytes, stream);
}

}  // namespace vivace::sm80
