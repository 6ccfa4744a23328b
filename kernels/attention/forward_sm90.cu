#include "kernels/attention/forward_sm90.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/attention/launch.h"

namespace vivace {
namespace sm90 {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// cuTensorMapEncodeTiled, found at run time: no link to libcuda.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      pointer = nullptr;
    }
    return reinterpret_cast<EncodeTiled>(pointer);
  }();
  return function;
}

/// A (batch, rows, heads, head_dim) tensor, read or written in boxes of 64 columns and `box_rows` rows of one head.
bool encode_map(CUtensorMap& map, DType dtype, const void* data, const int64_t (&stride)[3], int64_t batch, int64_t rows,
                int64_t heads, int64_t head_dim, int box_rows) {
  // The stride of a dimension of size 1 is arbitrary for the caller, but not for the engine.
  auto bytes = [](int64_t elements, int64_t size) { return static_cast<cuuint64_t>(size == 1 ? 16 : elements * 2); };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {bytes(stride[1], rows), bytes(stride[2], heads), bytes(stride[0], batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  for (const cuuint64_t s : strides) {
    if (s % 16 != 0 || s == 0 || s >= (cuuint64_t{1} << 40)) return false;
  }
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  return encode_tiled()(&map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                        4, const_cast<void*>(data), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int multiprocessor_count() {
  static std::atomic<int> counts[64];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 132;
  std::atomic<int>& count = counts[device & 63];
  int value = count.load(std::memory_order_relaxed);
  if (value == 0) {
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    count.store(value, std::memory_order_relaxed);
  }
  return value;
}

template <typename Traits>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  CUtensorMap q_map, k_map, v_map, o_map;
  if (!encode_map(q_map, p.dtype, p.q, p.q_stride, p.batch, p.seqlen_q, p.heads, p.head_dim, Traits::rows) ||
      !encode_map(k_map, p.dtype, p.k, p.k_stride, p.batch, p.seqlen_k, p.heads_kv, p.head_dim, Traits::keys) ||
      !encode_map(v_map, p.dtype, p.v, p.v_stride, p.batch, p.seqlen_k, p.heads_kv, p.head_dim, Traits::keys) ||
      !encode_map(o_map, p.dtype, p.out, p.out_stride, p.batch, p.seqlen_q, p.heads, p.head_dim, 64)) {
    return cudaErrorNotSupported;
  }
  constexpr float kLog2E = 1.4426950408889634f;
  ForwardArgs args;
  args.lse = p.lse;
  args.batch = static_cast<int32_t>(p.batch);
  args.heads = static_cast<int32_t>(p.heads);
  args.heads_kv = static_cast<int32_t>(p.heads_kv);
  args.group = static_cast<int32_t>(p.heads / p.heads_kv);
  args.seqlen_q = static_cast<int32_t>(p.seqlen_q);
  args.seqlen_k = static_cast<int32_t>(p.seqlen_k);
  args.row_blocks = (args.seqlen_q + Traits::rows - 1) / Traits::rows;
  args.tiles = args.row_blocks * args.batch * args.heads;
  // Half of a 50 MB L2 for K and V leaves room for Q and the output.
  const int64_t kv_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * 2;
  args.heads_in_l2 =
      static_cast<int32_t>(std::clamp<int64_t>((int64_t{24} << 20) / kv_bytes * args.group, 1, p.batch * p.heads));
  args.window_left = static_cast<int32_t>(p.window_left);
  args.window_right = static_cast<int32_t>(p.causal ? 0 : p.window_right);
  args.softmax_scale = p.softmax_scale;
  args.scale_log2 = p.softmax_scale * kLog2E;

  constexpr int kSmemBytes = sizeof(ForwardSmem<Traits>);
  static_assert(kSmemBytes <= 227 * 1024);
  auto* kernel = forward_sm90_kernel<Traits>;
  static const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (configured != cudaSuccess) return configured;
  const int grid = std::min(args.tiles, multiprocessor_count());
  kernel<<<grid, Traits::threads, kSmemBytes, stream>>>(args, q_map, k_map, v_map, o_map);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t dispatch(const AttentionParams& p, cudaStream_t stream) {
  const bool masked = p.causal || p.window_left >= 0 || p.window_right >= 0;
  if (p.head_dim == 64) {
    return masked ? launch<ForwardTraits<Element, 64, 128, 3, 3, true, 2>>(p, stream)
                  : launch<ForwardTraits<Element, 64, 128, 3, 3, false, 2>>(p, stream);
  }
  return masked ? launch<ForwardTraits<Element, 128, 128, 2, 2, true, 0>>(p, stream)
                : launch<ForwardTraits<Element, 128, 128, 2, 2, false, 0>>(p, stream);
}

/// Dense self- or cross-attention without score modifiers.
bool covers(const AttentionParams& p) {
  const bool plain = p.softcap == 0.0f && p.alibi_slopes == nullptr && p.bias == nullptr && p.sinks == nullptr &&
                     p.dropout_p == 0.0f && p.rotary_cos == nullptr;
  const bool dense = !p.has_cache && p.cu_seqlens_q == nullptr && p.cu_seqlens_k == nullptr && p.seqused_q == nullptr &&
                     p.seqused_k == nullptr && p.block_table == nullptr;
  // Every row must see a key: a tile without any has no place in the sequence of blocks.
  const bool sees = (!p.causal && p.window_left < 0 && p.window_right < 0) || p.seqlen_k >= p.seqlen_q;
  constexpr int64_t kMax = int64_t{1} << 30;
  return plain && dense && sees && (p.head_dim == 64 || p.head_dim == 128) && p.head_dim_v == p.head_dim &&
         (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.seqlen_q > 0 && p.seqlen_k > 0 && p.batch > 0 &&
         p.heads > 0 && p.softmax_scale > 0.0f && p.seqlen_q < kMax && p.seqlen_k < kMax &&
         p.batch * p.heads * (p.seqlen_q / 128 + 1) < kMax;
}

}  // namespace
}  // namespace sm90

cudaError_t attention_forward_sm90(const AttentionParams& params, cudaStream_t stream) {
  if (!sm90::covers(params) || sm90::encode_tiled() == nullptr) return cudaErrorNotSupported;
  return params.dtype == DType::kFloat16 ? sm90::dispatch<__half>(params, stream)
                                         : sm90::dispatch<__nv_bfloat16>(params, stream);
}

}  // namespace vivace
