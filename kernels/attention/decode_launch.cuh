// Instantiates and launches the decode kernels of one family.
#pragma once

#include <atomic>

#include "kernels/attention/decode_kernel.cuh"
#include "kernels/attention/decode_launch_number.h"
#include "kernels/attention/launch.h"
#include "kernels/attention/workspace.h"
#include "kernels/common/dependent_launch.h"
#include "kernels/common/vector.cuh"

namespace vivace {

/// 16-bit heads of whole 16-byte vectors that start at multiples of 16 bytes, no dropout and no bias.
/// q and out are read and written two elements at a time.
inline bool decode_covers(const AttentionParams& p) {
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return false;
  for (int i = 0; i < 3; ++i) {
    if (p.q_stride[i] % 2 != 0 || p.out_stride[i] % 2 != 0) return false;
  }
  if (reinterpret_cast<uintptr_t>(p.q) % 4 != 0 || reinterpret_cast<uintptr_t>(p.out) % 4 != 0) return false;
  return p.dropout_p == 0.0f && p.bias == nullptr && p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && p.head_dim <= 256 &&
         p.head_dim_v <= 256 && is_aligned_16(p.k) && is_aligned_16(p.v) &&
         are_aligned_16({p.k_stride[0], p.k_stride[1], p.k_stride[2], p.v_stride[0], p.v_stride[1], p.v_stride[2]}, 2);
}

/// Up to so many bytes of cache a call is launched as a programmatic dependent. Starting early hides up to 0.6 us; a launch
/// that fills the processors for longer gains nothing and lost 1 to 2 %.
inline constexpr int64_t kMaxDependentBytes = int64_t{16} << 20;

template <typename T, int kDim, int kTiles, typename Copy>
cudaError_t launch_decode(DecodeArgs& args, const typename Copy::Maps& maps, cudaStream_t stream) {
  using Shared = DecodeShared<Copy>;
  const AttentionParams& p = args.params;
  // One CTA of 8 warps a multiprocessor, or kDecodeCtasPerSm smaller ones.
  if constexpr (Copy::kWarps == 8) args.ranges = args.small_ranges;
  const int buffer = DecodeMerge<T, kDim, kTiles, Copy::kWarps>::buffer_floats(args.rows);
  auto* kernel = decode_kernel<T, kDim, kTiles, Copy>;
  using Plan = DecodePlan<decode_keys(kDim), 32 * Copy::kWarps>;
  constexpr int kMost = Shared::bytes(DecodeMerge<T, kDim, kTiles, Copy::kWarps>::buffer_floats(8 * kTiles),
                                      Plan::shared_bytes(kDecodeEntries));
  static_assert(kMost <= 227 * 1024);
  static std::atomic<uint64_t> configured;  // a bit a device
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if ((configured.load(std::memory_order_relaxed) >> (device & 63) & 1) == 0) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
    if (status != cudaSuccess) return status;
    configured.fetch_or(uint64_t{1} << (device & 63), std::memory_order_relaxed);
  }
  const bool dependent =
      p.dependent && p.batch * p.seqlen_k * p.heads_kv * (p.head_dim + p.head_dim_v) * 2 <= kMaxDependentBytes;
  for (int64_t first = 0; first < p.batch; first += kDecodeEntries) {
    args.first_entry = static_cast<int>(first);
    args.entries = static_cast<int>(p.batch - first < kDecodeEntries ? p.batch - first : kDecodeEntries);
    args.launch = decode_launch_number();
    status = launch_kernel(kernel, dim3(static_cast<unsigned>(args.ranges * args.units)), 32 * Copy::kWarps,
                           Shared::bytes(buffer, Plan::shared_bytes(args.entries)), stream, dependent, args, maps);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

/// Up to so many tiles a range one CTA a multiprocessor does all: more would only make more parts.
inline constexpr int kSmallTiles = 16;

/// What the launch needs beside the call.
inline DecodeArgs decode_args(const AttentionParams& p, const DecodeShape& shape) {
  DecodeArgs args{};
  args.params = p;
  use_rotated_q(args.params);
  args.window = Window(p);
  if (p.page_size > 0) args.page_size = FastDivmod(p.page_size);
  args.group = static_cast<int>(p.heads / p.heads_kv);
  args.by_group = FastDivmod(args.group);
  args.rows = static_cast<int>(shape.rows);
  args.row_tiles = static_cast<int>(shape.row_tiles);
  args.units = static_cast<int>(shape.units);
  args.ranges = static_cast<int>(shape.ranges);
  args.small_ranges = static_cast<int>(shape.ranges > 1 ? p.multiprocessors / shape.units : 1);
  if (args.small_ranges < 1) args.small_ranges = 1;
  args.small_tiles = kSmallTiles;
  args.fixed = p.num_splits > 0 || p.split_keys > 0;
  const int64_t keys = decode_keys(shape.head_dim);
  args.split_tiles = p.num_splits > 0 ? 0 : static_cast<int>(ceil_div(p.split_keys, keys));
  args.packets = static_cast<char*>(p.workspace) + attention_workspace(p).packets;
  return args;
}

/// launch.operator()<T, kDim, kTiles>() for the types and tiles of a call.
template <typename Launch>
cudaError_t launch_decode_shape(DType dtype, const DecodeShape& shape, const Launch& launch) {
  const bool wide = shape.column_tiles == 2;
  const auto of = [&]<typename T>() {
    if (shape.head_dim == 64) return wide ? launch.template operator()<T, 64, 2>() : launch.template operator()<T, 64, 1>();
    if (shape.head_dim == 128)
      return wide ? launch.template operator()<T, 128, 2>() : launch.template operator()<T, 128, 1>();
    return launch.template operator()<T, 256, 1>();
  };
  return dtype == DType::kFloat16 ? of.template operator()<__half>() : of.template operator()<__nv_bfloat16>();
}

}  // namespace vivace
