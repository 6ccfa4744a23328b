// attention_decode for Hopper: copies by the tensor copy engine, which starts sooner, or by cp.async, which streams from
// memory 5 % faster; three stages of 8 KiB a warp. head_dim 64 and 256: two CTAs a multiprocessor. head_dim 128, whose
// results are larger to merge: one CTA of 8 warps, so that an entry has fewer parts.
#include "kernels/attention/decode_launch.cuh"
#include "kernels/attention/forward_sm90_launch.cuh"

namespace vivace {
namespace {

/// From here on keys and values come from memory, and a row is long enough for streaming to be all that counts. By the
/// capacity: the host does not know lengths.
constexpr int64_t kStreamBytes = int64_t{150} << 20, kStreamKeys = 1024;

template <typename T, int kDim, int kTiles>
cudaError_t launch(DecodeArgs& args, cudaStream_t stream) {
  constexpr int kKeys = decode_keys(kDim), kWarps = kDim == 64 ? 4 : kDim == 128 ? 8 : 2;
  const AttentionParams& p = args.params;
  const int64_t bytes = p.batch * p.seqlen_k * p.heads_kv * (p.head_dim + p.head_dim_v) * 2;
  if constexpr (kDim <= 128) {
    if (bytes >= kStreamBytes && p.seqlen_k >= kStreamKeys) {
      // With that many rows merging is rare, and the two smaller CTAs of the sm80 kernel are 3 % faster.
      if (kDim == 128 && p.batch * args.units >= 4 * p.multiprocessors) return cudaErrorNotSupported;
      constexpr int kStages = kDim == 64 ? 3 : 2;
      return launch_decode<T, kDim, kTiles, DecodeCopy<T, kKeys, kDim, kWarps, kStages>>(args, {}, stream);
    }
  }
  using Copy = DecodeTensorCopy<T, kKeys, kDim, kWarps, 3>;
  // How many rows or pages a cache has is not said; its indices are the caller's word.
  const int64_t rows = int64_t{1} << 30, keys = p.block_table != nullptr ? p.page_size : p.seqlen_k;
  typename Copy::Maps maps;
  if (!sm90::encode_map(maps.k, p.dtype, p.k, p.k_stride, rows, keys, p.heads_kv, p.head_dim, kKeys) ||
      !sm90::encode_map(maps.v, p.dtype, p.v, p.v_stride, rows, keys, p.heads_kv, p.head_dim_v, kKeys)) {
    return cudaErrorNotSupported;
  }
  return launch_decode<T, kDim, kTiles, Copy>(args, maps, stream);
}

}  // namespace

cudaError_t attention_decode_sm90(const AttentionParams& p, cudaStream_t stream) {
  if (!decode_covers(p) || !p.has_cache || sm90::encode_tiled() == nullptr) return cudaErrorNotSupported;
  if (p.batch == 0 || p.total_q == 0 || p.heads == 0) return cudaSuccess;
  const DecodeShape shape = decode_shape(p);
  if (shape.ranges * shape.units > 0x7fffffff) return cudaErrorNotSupported;
  if (p.block_table != nullptr && p.page_size % decode_keys(shape.head_dim) != 0) return cudaErrorNotSupported;
  DecodeArgs args = decode_args(p, shape);
  return launch_decode_shape(p.dtype, shape,
                             [&]<typename T, int kDim, int kTiles>() { return launch<T, kDim, kTiles>(args, stream); });
}

}  // namespace vivace
