// Launcher of the persistent token step: what it covers, its workspace and its tensor maps.
#include <algorithm>

#include "kernels/common/tensor_map.h"
#include "kernels/step/launch.h"
#include "kernels/step/persistent.cuh"

namespace vivace {
namespace {

using namespace step;

template <int kDims>
bool encode(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[kDims], const cuuint64_t (&strides)[kDims - 1],
            const cuuint32_t (&box)[kDims]) {
  cuuint32_t element_strides[kDims];
  std::fill_n(element_strides, kDims, 1u);
  return sm90::encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims, const_cast<void*>(data), sizes, strides, box,
                              element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// A matrix (outputs, inputs) in boxes of 8 outputs and `groups` groups of 64 inputs.
bool encode_matrix(CUtensorMap& map, const void* data, int64_t outputs, int64_t inputs, int groups) {
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(outputs), static_cast<cuuint64_t>(inputs / 64)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(inputs * 2), 128};
  const cuuint32_t box[3] = {64, 8, static_cast<cuuint32_t>(groups)};
  return encode<3>(map, data, sizes, strides, box);
}

template <int kHeads, int kRows>
cudaError_t launch(const StepParams& p, cudaStream_t stream) {
  using S = PersistentShape<kHeads, kRows>;
  PersistentArgs args;
  args.p = p;
  args.in_flight = 2;
  args.pace = 0;
  args.zero = 0;
  {
    // Outputs i and 32 + i of a head, a rotary pair, in one box.
    const cuuint64_t row = S::hidden * 2;
    const cuuint64_t sizes[5] = {64, 32, 2, S::heads, static_cast<cuuint64_t>(p.layers * 3 * S::heads)};
    const cuuint64_t strides[4] = {row, 32 * row, 128, 64 * row};
    const cuuint32_t box[5] = {64, 4, 2, S::heads, 1};
    if (!encode<5>(args.qkv, p.qkv, sizes, strides, box)) return cudaErrorInvalidValue;
  }
  {
    const cuuint64_t sizes[2] = {S::hidden, static_cast<cuuint64_t>(p.layers * S::hidden)};
    const cuuint64_t strides[1] = {S::hidden * 2};
    const cuuint32_t box[2] = {64, 8 * S::heads};
    if (!encode<2>(args.out, p.out, sizes, strides, box)) return cudaErrorInvalidValue;
  }
  if (!encode_matrix(args.gate_up, p.gate_up, p.layers * 2 * S::intermediate, S::hidden, S::heads) ||
      !encode_matrix(args.down, p.down, p.layers * S::hidden, S::intermediate, S::heads) ||
      !encode_matrix(args.head, p.head, p.vocab, S::hidden, S::heads)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = persistent_kernel<kHeads, kRows>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes)) return e;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(S::ctas);
  config.blockDim = dim3(S::threads);
  config.dynamicSmemBytes = S::shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;  // all CTAs at once, or an error
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <int kHeads>
cudaError_t launch_rows(const StepParams& p, cudaStream_t stream) {
  if (p.rows <= 1) return launch<kHeads, 1>(p, stream);
  if (p.rows <= 2) return launch<kHeads, 2>(p, stream);
  return launch<kHeads, 4>(p, stream);
}

/// A head's keys are contiguous, and rows of all caches 16-byte aligned.
bool is_streamable(const int64_t (&stride)[4]) {
  return stride[2] == 64 && stride[0] % 8 == 0 && stride[1] % 8 == 0 && stride[3] % 8 == 0;
}

}  // namespace

bool step_persistent_supported(const StepParams& p) {
  if (p.dtype != DType::kBFloat16 || p.arch < 90 || p.rows < 1 || p.rows > Mailboxes<16>::kMaxRows) return false;
  if (p.heads != 16 && p.heads != 4) return false;
  if (p.head_dim != 64 || p.heads_kv != p.heads || p.hidden != 64 * p.heads || p.intermediate != 4 * p.hidden) return false;
  if (p.layers < 1 || p.vocab < 1 || p.capacity > (1 << 24) || p.probes != nullptr) return false;
  if (!is_streamable(p.k_stride) || !is_streamable(p.v_stride)) return false;
  if (p.rotary_dtype != DType::kFloat32 && p.rotary_dtype != DType::kBFloat16) return false;
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return major == 9 && minor == 0 && multiprocessors >= 8 * p.heads && sm90::encode_tiled() != nullptr;
}

size_t step_persistent_workspace(const StepParams& p) { return p.heads == 16 ? Mailboxes<16>::bytes : Mailboxes<4>::bytes; }

cudaError_t step_persistent(const StepParams& p, cudaStream_t stream) {
  if (!step_persistent_supported(p) || p.workspace_bytes < step_persistent_workspace(p)) return cudaErrorInvalidValue;
  return p.heads == 16 ? launch_rows<16>(p, stream) : launch_rows<4>(p, stream);
}

}  // namespace vivace
