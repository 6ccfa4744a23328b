// attention_decode for sm_80 and newer: copies by cp.async, two stages of 8 KiB a warp, 64 KiB a CTA.
#include "kernels/attention/decode_launch.cuh"

namespace vivace {
namespace {

template <typename T, int kDim, int kTiles>
cudaError_t launch(DecodeArgs& args, cudaStream_t stream) {
  constexpr int kWarps = kDim == 256 ? 2 : 4;
  return launch_decode<T, kDim, kTiles, DecodeCopy<T, decode_keys(kDim), kDim, kWarps, 2>>(args, {}, stream);
}

}  // namespace

cudaError_t attention_decode_sm80(const AttentionParams& p, cudaStream_t stream) {
  if (!decode_covers(p)) return cudaErrorNotSupported;
  if (p.batch == 0 || p.total_q == 0 || p.heads == 0) return cudaSuccess;
  const DecodeShape shape = decode_shape(p);
  if (shape.ranges * shape.units > 0x7fffffff) return cudaErrorNotSupported;
  DecodeArgs args = decode_args(p, shape);
  return launch_decode_shape(p.dtype, shape,
                             [&]<typename T, int kDim, int kTiles>() { return launch<T, kDim, kTiles>(args, stream); });
}

}  // namespace vivace
