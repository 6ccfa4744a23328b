// Instantiates and launches the sm80 forward kernels of one head dimension. One head dimension a .cu file, so that they
// compile side by side.
#pragma once

#include "kernels/attention/forward_sm80.cuh"
#include "kernels/attention/forward_sm80_pipelined.cuh"
#include "kernels/attention/forward_sm80_split.cuh"

namespace vivace::sm80 {

/// Tile: of the kernel that runs.
template <typename Tile, typename Kernel>
cudaError_t launch_kernel(Kernel kernel, ForwardArgs& args, int shared_bytes, int64_t l2_bytes, cudaStream_t stream) {
  args.order = TileOrder(args.params, Tile::kM, l2_bytes);
  if (args.order.tiles() > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(args.order.tiles()), Tile::kThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kDim, bool kRich>
cudaError_t launch_variant(ForwardArgs& args, int64_t l2_bytes, Sm sm, cudaStream_t stream) {
  if constexpr (!kRich && splits<kDim>(Sm::kLarge)) {
    const auto split = [&](auto tile, int shared_bytes) {
      return launch_kernel<decltype(tile)>(attention_forward_split_kernel<T, kDim>, args, shared_bytes, l2_bytes, stream);
    };
    if (sm == Sm::kLarge) return split(SplitTile<kDim, Sm::kLarge>(), kSplitSharedBytes<kDim, Sm::kLarge>);
    if (sm == Sm::kMedium) return split(SplitTile<kDim, Sm::kMedium>(), kSplitSharedBytes<kDim, Sm::kMedium>);
  }
  void (*kernel)(ForwardArgs);
  if constexpr (ForwardTile<kDim, false>::kPipelined) {
    kernel = attention_forward_pipelined_kernel<T, kDim, kRich>;
  } else {
    kernel = attention_forward_kernel<T, kDim, kRich>;
  }
  return sm == Sm::kSmall
             ? launch_kernel<ForwardTile<kDim, true>>(kernel, args, kSharedBytes<kDim, true>, l2_bytes, stream)
             : launch_kernel<ForwardTile<kDim, false>>(kernel, args, kSharedBytes<kDim, false>, l2_bytes, stream);
}

template <int kDim>
cudaError_t launch_forward(ForwardArgs& args, bool rich, int64_t l2_bytes, Sm sm, cudaStream_t stream) {
  if (args.params.dtype == DType::kBFloat16) {
    return rich ? launch_variant<__nv_bfloat16, kDim, true>(args, l2_bytes, sm, stream)
                : launch_variant<__nv_bfloat16, kDim, false>(args, l2_bytes, sm, stream);
  }
  return rich ? launch_variant<__half, kDim, true>(args, l2_bytes, sm, stream)
              : launch_variant<__half, kDim, false>(args, l2_bytes, sm, stream);
}

}  // namespace vivace::sm80
