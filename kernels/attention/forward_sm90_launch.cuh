// Instantiates and launches the sm90 forward kernels of one head dimension. One head dimension a .cu file, so that they
// compile side by side.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/attention/forward_sm90.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/common/device.h"
#include "kernels/common/tensor_map.h"

namespace vivace::sm90 {

/// A (batch, rows, heads, head_dim) tensor, read or written in boxes of 64 columns and `box_rows` rows of one head;
/// false where the engine cannot: addresses and strides are multiples of 16 bytes. Reads past an end give 0.
inline bool encode_map(CUtensorMap& map, DType dtype, const void* data, const int64_t (&stride)[3], int64_t batch,
                       int64_t rows, int64_t heads, int64_t head_dim, int box_rows) {
  // The stride of a dimension of size 1 is arbitrary for the caller, but not for the engine.
  auto bytes = [](int64_t elements, int64_t size) { return size == 1 ? 16 : elements * 2; };
  const int64_t strides[3] = {bytes(stride[1], rows), bytes(stride[2], heads), bytes(stride[0], batch)};
  for (const int64_t s : strides) {
    if (s % 16 != 0 || s <= 0 || s >= (int64_t{1} << 40)) return false;
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  return encode_tensor_map(map, dtype, data, {head_dim, rows, heads, batch}, {strides[0], strides[1], strides[2]},
                           {64, box_rows, 1, 1});
}

template <typename Traits>
cudaError_t launch(const AttentionParams& params, cudaStream_t stream) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  AttentionParams p = params;
  use_rotated_q(p);
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = !p.has_cache && p.cu_seqlens_k != nullptr;
  const int64_t q_batch = packed_q ? 1 : p.batch, q_rows = packed_q ? p.total_q : p.seqlen_q;
  // How many rows a cache has is not said; its indices are the caller's word.
  const int64_t k_batch = packed_k ? 1 : p.cache_batch_idx != nullptr ? int64_t{1} << 20 : p.batch;
  const int64_t k_rows = packed_k ? p.total_k : p.seqlen_k;
  CUtensorMap q_map, k_map, v_map, o_map;
  if (!encode_map(q_map, p.dtype, p.q, p.q_stride, q_batch, q_rows, p.heads, p.head_dim, Traits::rows) ||
      !encode_map(k_map, p.dtype, p.k, p.k_stride, k_batch, k_rows, p.heads_kv, p.head_dim, Traits::keys) ||
      !encode_map(v_map, p.dtype, p.v, p.v_stride, k_batch, k_rows, p.heads_kv, p.head_dim, Traits::keys) ||
      !encode_map(o_map, p.dtype, p.out, p.out_stride, q_batch, q_rows, p.heads, p.head_dim, 64)) {
    return cudaErrorNotSupported;
  }
  ForwardArgs args{};
  args.lse = p.lse;
  args.out = p.out;
  args.v = p.v;
  std::copy_n(p.out_stride, 3, args.out_stride);
  std::copy_n(p.v_stride, 3, args.v_stride);
  args.lse_head_stride = packed_q ? p.total_q : p.seqlen_q;
  args.lse_batch_stride = p.heads * p.seqlen_q;
  args.batch = static_cast<int32_t>(p.batch);
  args.heads = static_cast<int32_t>(p.heads);
  args.group = static_cast<int32_t>(p.heads / p.heads_kv);
  args.head_dim = static_cast<int32_t>(p.head_dim);
  args.seqlen_q = static_cast<int32_t>(p.seqlen_q);
  args.seqlen_k = static_cast<int32_t>(p.seqlen_k);
  args.row_blocks = (args.seqlen_q + Traits::rows - 1) / Traits::rows;
  args.tiles = args.row_blocks * args.batch * args.heads;
  if (packed_q) {
    args.tiles = std::min(args.tiles, static_cast<int32_t>(p.total_q / Traits::rows + p.batch) * args.heads);
  }
  const Window window(p);
  args.window_left = window.left;
  args.window_right = window.right;
  args.softmax_scale = p.softmax_scale;
  args.scale_log2 = p.softmax_scale * kLog2E;
  args.cu_seqlens_q = p.cu_seqlens_q;
  args.cu_seqlens_k = packed_k ? p.cu_seqlens_k : nullptr;
  args.seqused_q = p.seqused_q;
  args.seqused_k = p.seqused_k;
  args.cache_seqlens = p.cache_seqlens;
  args.cache_batch_idx = p.cache_batch_idx;
  args.has_cache = p.has_cache;
  args.appended = p.k_new == nullptr ? 0 : packed_q ? -1 : static_cast<int32_t>(p.seqlen_new);

  constexpr int kSmemBytes = sizeof(ForwardSmem<Traits>);
  static_assert(kSmemBytes <= 227 * 1024);
  auto* kernel = forward_sm90_kernel<Traits>;
  int device;
  DeviceFacts facts;
  cudaError_t status = device_facts(device, facts);
  if (status != cudaSuccess) return status;
  static std::atomic<uint64_t> allowed;
  status = allow_shared_memory(reinterpret_cast<const void*>(kernel), kSmemBytes, device, allowed);
  if (status != cudaSuccess) return status;
  const int grid = std::min(args.tiles, facts.multiprocessors);
  if constexpr (Traits::masked && !Traits::ragged) {
    // A third of L2 for K and V leaves room for Q, the output, and the next group.
    const int64_t kv_bytes = std::max<int64_t>(p.seqlen_k, 1) * (p.head_dim + p.head_dim_v) * 2;
    const int64_t pairs = p.batch * p.heads,
                  most = std::clamp<int64_t>(facts.l2_bytes / 3 / kv_bytes * args.group, 1, pairs);
    args.order =
        masked_order(MaskedShape{args.row_blocks, static_cast<int>(pairs), Traits::rows, Traits::keys, args.seqlen_q,
                                 args.seqlen_k, args.window_left, args.window_right, grid, static_cast<int>(most)});
  }
  kernel<<<grid, Traits::threads, kSmemBytes, stream>>>(args, q_map, k_map, v_map, o_map);
  return cudaGetLastError();
}

template <typename Element, int kHeadDim, bool kMasked>
cudaError_t launch_dense_as(const AttentionParams& p, cudaStream_t stream) {
#define VIVACE_LAUNCH(...) launch<ForwardTraits<Element, kHeadDim, __VA_ARGS__, kMasked, false>>(p, stream)
  if constexpr (kHeadDim == 64) {
    if constexpr (!kMasked) {
      if (long_64(p.seqlen_k)) return VIVACE_LAUNCH(kLong64);
    }
    int device;
    DeviceFacts facts;
    if (const cudaError_t status = device_facts(device, facts); status != cudaSuccess) return status;
    const bool causal = kMasked && Window(p).left == Window::kOpen;
    switch (consumers_64(p.seqlen_q, p.batch * p.heads, causal, facts.multiprocessors)) {
      case 1: return VIVACE_LAUNCH(shape_64<kMasked>(1));
      case 2: return VIVACE_LAUNCH(shape_64<kMasked>(2));
      case 3: return VIVACE_LAUNCH(shape_64<kMasked>(3));
      default: return VIVACE_LAUNCH(shape_64<kMasked>(4));
    }
  } else if constexpr (kHeadDim <= 128) {
    if (!long_128(p.seqlen_q)) return VIVACE_LAUNCH(kShort128);
    return VIVACE_LAUNCH(kHeadDim == 96 ? kLong96 : kLong128<kMasked>);
  } else {
    return VIVACE_LAUNCH(kHeadDim == 192 ? k192<kMasked> : k256);
  }
#undef VIVACE_LAUNCH
}

/// Calls of at most kHeadDim columns, on dense sequences.
template <int kHeadDim, bool kMasked>
cudaError_t launch_dense(const AttentionParams& p, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_dense_as<__half, kHeadDim, kMasked>(p, stream)
                                    : launch_dense_as<__nv_bfloat16, kHeadDim, kMasked>(p, stream);
}

/// The same where lengths come from device memory.
template <int kHeadDim>
cudaError_t launch_ragged(const AttentionParams& p, cudaStream_t stream) {
  constexpr TileShape kShape = kHeadDim == 64    ? kRagged64
                               : kHeadDim <= 128 ? kRagged128
                               : kHeadDim == 192 ? k192<true>
                                                 : k256;
  return p.dtype == DType::kFloat16 ? launch<ForwardTraits<__half, kHeadDim, kShape, true, true>>(p, stream)
                                    : launch<ForwardTraits<__nv_bfloat16, kHeadDim, kShape, true, true>>(p, stream);
}

}  // namespace vivace::sm90
