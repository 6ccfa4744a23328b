// Launcher of the split token step: what it covers, its workspace and its tensor maps.
#include <algorithm>

#include "kernels/step/launch.h"
#include "kernels/step/split.cuh"
#include "kernels/step/step_map.h"

namespace vivace {
namespace {

using namespace split;

template <typename T, int kHeads, int kParts>
cudaError_t launch_parts(const StepParams& p, cudaStream_t stream) {
  using S = Shape<kHeads, kParts>;
  using L = Layout<kHeads>;
  Args args;
  args.p = p;
  int device = 0, multiprocessors = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  args.attentions = multiprocessors / 2 * 2 - S::products;
  args.signals = 2 * args.attentions;
  const int64_t row = S::hidden * 2;
  const auto activations = [&](CUtensorMap(&maps)[kMaxParts], size_t at, int64_t columns) {
    bool done = true;
    for (int part = 0; part < kParts; ++part) {
      done = done && step::encode_map(maps[part], p.dtype, static_cast<char*>(p.workspace) + part * L::part + at,
                                      {64, kPartRows, columns / 64}, {columns * 2, 128}, {64, kPartRows, S::group});
    }
    return done;
  };
  // In one box of qkv: 4 outputs i and 32 + i of a head, rotary pairs, of q, k and v, in 2 blocks of columns. Gate and up:
  // 32 of both, twice.
  if (!step::encode_map(args.qkv, p.dtype, p.qkv, {64, p.layers * 3 * S::hidden, 2, 3, S::hidden / 64},
                        {row, 32 * row, S::hidden * row, 128}, {64, 4, 2, 3, 2}) ||
      !step::encode_map(args.gate_up, p.dtype, p.gate_up, {S::hidden, 32, 2, S::intermediate / 32, p.layers},
                        {row, S::intermediate * row, 32 * row, 2 * S::intermediate * row}, {64, 32, 2, 2, 1}) ||
      !step::encode_matrix(args.out, p.dtype, p.out, p.layers * S::hidden, S::hidden, 16, S::out_blocks) ||
      !step::encode_matrix(args.down, p.dtype, p.down, p.layers * S::hidden, S::intermediate, 64, 2) ||
      !step::encode_matrix(args.head, p.dtype, p.head, p.vocab, S::hidden, S::tile, 1) ||
      !activations(args.attention, L::attention, S::hidden)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = split_kernel<T, kHeads, kParts>;
  constexpr size_t kBytes = kSharedBytes<S>;
  static_assert(kBytes <= 227 * 1024);
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;  // all CTAs at once, or an error
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = 2;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(S::products + args.attentions);
  config.blockDim = dim3(S::threads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

/// A part has up to 64 rows: what the products do for it takes as long for fewer, so there are no more parts than needed,
/// but two, which take turns.
template <typename T, int kHeads>
cudaError_t launch(const StepParams& p, cudaStream_t stream) {
  if (p.rows <= 2 * kPartRows) return launch_parts<T, kHeads, 2>(p, stream);
  if (p.rows <= 3 * kPartRows) return launch_parts<T, kHeads, 3>(p, stream);
  return launch_parts<T, kHeads, 4>(p, stream);
}

}  // namespace

bool step_split_supported(const StepParams& p) {
  if ((p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) || p.arch < 90 || p.arch >= 100 || p.rows < 1)
    return false;
  if (p.heads != 16 || p.head_dim != 64 || p.heads_kv != p.heads || p.hidden != 64 * p.heads ||
      p.intermediate != 4 * p.hidden)
    return false;
  if (p.layers < 1 || p.layers > (1 << 14) || p.vocab < 1 || p.vocab > (1 << 24) || p.capacity > (1 << 24)) return false;
  if (!step::has_contiguous_keys(p.k_stride) || !step::has_contiguous_keys(p.v_stride) ||
      p.probe_count > StepParams::kMaxProbes)
    return false;
  return step::is_hopper_with(6 * p.heads);
}

size_t step_split_workspace(const StepParams& p) { return Layout<16>::bytes(p.layers); }

cudaError_t step_split(const StepParams& params, cudaStream_t stream) {
  if (!step_split_supported(params) || params.workspace_bytes < step_split_workspace(params)) return cudaErrorInvalidValue;
  StepParams p = params;
  const int64_t launches = (params.rows + kMaxRows - 1) / kMaxRows, most = (params.rows + launches - 1) / launches;
  for (int64_t first = 0; first < params.rows; first += most) {
    p.rows = std::min(most, params.rows - first);
    p.row_request = params.row_request + first;
    p.cache_seqlens = params.cache_seqlens + first;
    p.cache_batch_idx = params.cache_batch_idx + first;
    p.logits = params.logits + first * params.vocab;
    p.probes = params.probes == nullptr ? nullptr : params.probes + first * params.probe_capacity;
    const cudaError_t status =
        p.dtype == DType::kFloat16 ? launch<__half, 16>(p, stream) : launch<__nv_bfloat16, 16>(p, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace vivace
