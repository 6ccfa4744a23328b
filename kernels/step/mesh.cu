// Launcher of the mesh token step: what it covers, its workspace and its tensor maps.
#include "kernels/step/launch.h"
#include "kernels/step/mesh.cuh"
#include "kernels/step/step_map.h"

namespace vivace {
namespace {

using namespace mesh;

bool encode_all(Args& args) {
  const StepParams& p = args.p;
  constexpr int64_t kRow = kHidden * 2;
  bool done = step::encode_matrix(args.qkv, p.dtype, p.qkv, p.layers * 3 * kHidden, kHidden, kDim, kColumns / 64) &&
              step::encode_matrix(args.out, p.dtype, p.out, p.layers * kHidden, kHidden, kColumns, 1) &&
              step::encode_matrix(args.down, p.dtype, p.down, p.layers * kHidden, kIntermediate, kColumns, 1) &&
              // 64 columns of either half, of gate and of up
              step::encode_map(args.gate_up, p.dtype, p.gate_up, {kHidden / 2, kIntermediate, 2, 2, p.layers},
                               {kRow, kIntermediate * kRow, kHidden, 2 * kIntermediate * kRow}, {64, kShare, 2, 2, 1}) &&
              step::encode_map(args.head, p.dtype, p.head, {kHidden / 2, p.vocab, 2}, {kRow, kHidden}, {64, 64, 2});
  for (int i = 0; i < 8; ++i) {
    done = done && step::encode_cache(args.keys[i], p, p.k_cache, p.k_stride, 8 * i + 8) &&
           step::encode_cache(args.values[i], p, p.v_cache, p.v_stride, 8 * i + 8);
  }
  return done;
}

template <typename T, bool kProbes>
cudaError_t launch(const StepParams& p, cudaStream_t stream) {
  Args args;
  args.p = p;
  if (!encode_all(args)) return cudaErrorInvalidValue;
  const auto kernel = mesh_kernel<T, kProbes>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;  // all CTAs at once, or an error
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCtas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T>
cudaError_t launch_probes(const StepParams& p, cudaStream_t stream) {
  return p.probes == nullptr ? launch<T, false>(p, stream) : launch<T, true>(p, stream);
}

}  // namespace

bool step_mesh_supported(const StepParams& p) {
  if ((p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) || p.arch < 90 || p.arch >= 100) return false;
  if (p.rows < 1 || p.rows > kMaxRows) return false;
  if (p.heads != kHeads || p.heads_kv != kHeads || p.head_dim != kDim || p.hidden != kHidden ||
      p.intermediate != kIntermediate)
    return false;
  if (p.layers < 2 || p.layers % 2 != 0 || p.layers > (1 << 14)) return false;  // see mesh_vector.cuh
  if (p.vocab < 1 || p.vocab > (1 << 24) || p.capacity < 1 || p.capacity > (1 << 24)) return false;
  if (p.probe_count > StepParams::kMaxProbes || p.probe_capacity > (1 << 24)) return false;
  if (!step::has_contiguous_keys(p.k_stride) || !step::has_contiguous_keys(p.v_stride)) return false;
  return step::is_hopper_with(kCtas);
}

size_t step_mesh_workspace(const StepParams&) { return Layout::bytes; }

cudaError_t step_mesh(const StepParams& p, cudaStream_t stream) {
  if (!step_mesh_supported(p) || p.workspace_bytes < step_mesh_workspace(p)) return cudaErrorInvalidValue;
  return p.dtype == DType::kFloat16 ? launch_probes<__half>(p, stream) : launch_probes<__nv_bfloat16>(p, stream);
}

}  // namespace vivace
