// Launches the CUDA-core attention forward; the kernel is in forward_generic.cuh.
#include "kernels/attention/forward_generic.cuh"

#include "kernels/attention/launch.h"

namespace vivace {
namespace {

template <typename T, int kGroups>
cudaError_t launch(const generic::ForwardArgs& args, cudaStream_t stream) {
  const auto kernel = generic::attention_forward_kernel<T, kGroups>;
  const int shared_bytes = static_cast<int>(generic::shared_bytes(args.params));
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(args.order.tiles()), generic::kThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_dim(const generic::ForwardArgs& args, cudaStream_t stream) {
  if (args.params.head_dim_v <= 64) return launch<T, 2>(args, stream);
  if (args.params.head_dim_v <= 128) return launch<T, 4>(args, stream);
  return launch<T, 8>(args, stream);
}

}  // namespace

cudaError_t attention_forward_generic(const AttentionParams& params, cudaStream_t stream) {
  if (params.head_dim > 256 || params.head_dim_v > 256) return cudaErrorNotSupported;
  if (params.batch == 0 || params.heads == 0 || params.seqlen_q == 0) return cudaSuccess;

  int device = 0, l2_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  if (error != cudaSuccess) return error;

  generic::ForwardArgs args{};
  args.params = params;
  use_rotated_q(args.params);
  args.window = Window(params);
  args.order = TileOrder(params, generic::kM, l2_bytes);
  if (args.order.tiles() > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (params.block_table != nullptr) args.page_size = FastDivmod(params.page_size);
  switch (params.dtype) {
    case DType::kFloat32: return launch_dim<float>(args, stream);
    case DType::kFloat16: return launch_dim<__half>(args, stream);
    case DType::kBFloat16: return launch_dim<__nv_bfloat16>(args, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace vivace
