// Launcher of the persistent token step: what it covers, its workspace and its tensor maps.
#include "kernels/step/launch.h"
#include "kernels/step/persistent.cuh"
#include "kernels/step/step_map.h"

namespace vivace {
namespace {

using namespace step;

/// How long the current device takes to read so many bytes, at that part of what its memory's clock and width make.
float read_ns(int bytes, float part) {
  int device = 0, clock = 0, width = 0;  // kHz, bits
  if (cudaGetDevice(&device) != cudaSuccess) return 0.0f;
  cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, device);
  cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, device);
  const float bytes_per_ns = 2e-6f * static_cast<float>(clock) * static_cast<float>(width) / 8;
  return bytes_per_ns > 0 ? static_cast<float>(bytes) / (part * bytes_per_ns) : 0.0f;
}

template <int kHeads, int kRows, bool kProbes>
cudaError_t launch(const StepParams& p, cudaStream_t stream) {
  using S = PersistentShape<kHeads, kRows>;
  PersistentArgs args;
  args.p = p;
  args.zero = 0;
  args.stage_ns = read_ns(S::stage_bytes * S::ctas, S::pace);
  const int64_t row = S::hidden * 2;
  const auto matrix = [&](CUtensorMap& map, const void* data, int64_t outputs, int64_t inputs) {
    return encode_matrix(map, p.dtype, data, outputs, inputs, 8, S::heads);
  };
  // Outputs i and 32 + i of a head of qkv, a rotary pair, in one box.
  if (!step::encode_map(args.qkv, p.dtype, p.qkv, {64, 32, 2, S::heads, p.layers * 3 * S::heads},
                        {row, 32 * row, 128, 64 * row}, {64, 4, 2, S::heads, 1}) ||
      !matrix(args.out, p.out, p.layers * S::hidden, S::hidden) ||
      !matrix(args.gate_up, p.gate_up, p.layers * 2 * S::intermediate, S::hidden) ||
      !matrix(args.down, p.down, p.layers * S::hidden, S::intermediate) || !matrix(args.head, p.head, p.vocab, S::hidden)) {
    return cudaErrorInvalidValue;
  }
  for (int i = 0; i < 2; ++i) {
    const int positions = i == 0 ? S::chunk : 8;
    if (!encode_cache(args.k[i], p, p.k_cache, p.k_stride, positions) ||
        !encode_cache(args.v[i], p, p.v_cache, p.v_stride, positions)) {
      return cudaErrorInvalidValue;
    }
  }
  const auto kernel = persistent_kernel<kHeads, kRows, kProbes>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) return e;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(S::ctas);
  config.blockDim = dim3(S::threads);
  config.dynamicSmemBytes = S::shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;  // all CTAs at once, or an error
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // all but weights is read after the wait
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <int kHeads, bool kProbes>
cudaError_t launch_rows(const StepParams& p, cudaStream_t stream) {
  if (p.rows <= 1) return launch<kHeads, 1, kProbes>(p, stream);
  if (p.rows <= 2) return launch<kHeads, 2, kProbes>(p, stream);
  return launch<kHeads, 4, kProbes>(p, stream);
}
template <int kHeads>
cudaError_t launch_probes(const StepParams& p, cudaStream_t stream) {
  return p.probes == nullptr ? launch_rows<kHeads, false>(p, stream) : launch_rows<kHeads, true>(p, stream);
}

/// Strides that the copy engine takes.
bool is_streamable(const int64_t (&stride)[4]) {
  return stride[0] % 8 == 0 && stride[1] % 8 == 0 && stride[2] % 8 == 0 && stride[3] % 8 == 0;
}

}  // namespace

bool step_persistent_supported(const StepParams& p) {
  if (p.dtype != DType::kBFloat16 || p.arch < 90 || p.rows < 1 || p.rows > Mailboxes<16>::kMaxRows) return false;
  if (p.heads != 16 && p.heads != 4) return false;
  if (p.head_dim != 64 || p.heads_kv != p.heads || p.hidden != 64 * p.heads || p.intermediate != 4 * p.hidden) return false;
  if (p.layers < 1 || p.vocab < 1 || p.capacity > (1 << 24)) return false;
  if (!is_streamable(p.k_stride) || !is_streamable(p.v_stride)) return false;
  if (p.rotary_dtype != DType::kFloat32 && p.rotary_dtype != DType::kBFloat16) return false;
  return is_hopper_with(8 * p.heads);
}

size_t step_persistent_workspace(const StepParams& p) { return p.heads == 16 ? Mailboxes<16>::bytes : Mailboxes<4>::bytes; }

cudaError_t step_persistent(const StepParams& p, cudaStream_t stream) {
  if (!step_persistent_supported(p) || p.workspace_bytes < step_persistent_workspace(p)) return cudaErrorInvalidValue;
  return p.heads == 16 ? launch_probes<16>(p, stream) : launch_probes<4>(p, stream);
}

}  // namespace vivace
