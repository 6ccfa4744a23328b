// Launcher of the mesh token step: what it covers, its workspace and its tensor maps.
#include <algorithm>
#include <initializer_list>

#include "kernels/common/tensor_map.h"
#include "kernels/step/launch.h"
#include "kernels/step/mesh.cuh"

namespace vivace {
namespace {

using namespace mesh;

/// In attention a warp waits for every 8th stage alone. What its slot held before must have landed by then, or the parity
/// would mislead: copies overtake each other, but not by more than this.
constexpr int32_t kMostInFlight = kStages - kWarps;

bool encode(CUtensorMap& map, DType dtype, const void* data, std::initializer_list<int64_t> sizes,
            std::initializer_list<int64_t> strides, std::initializer_list<int> box) {
  cuuint64_t size[5], stride[5];
  cuuint32_t boxes[5], element_strides[5] = {1, 1, 1, 1, 1};
  std::copy(sizes.begin(), sizes.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  std::copy(box.begin(), box.end(), boxes);
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return sm90::encode_tiled()(&map, type, static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data), size, stride,
                              boxes, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// A matrix (outputs, inputs) in boxes of `rows` outputs and `groups` groups of 64 inputs.
bool encode_matrix(CUtensorMap& map, DType dtype, const void* data, int64_t outputs, int64_t inputs, int rows, int groups) {
  return encode(map, dtype, data, {64, outputs, inputs / 64}, {inputs * 2, 128}, {64, rows, groups});
}

/// A cache (layers, cache_rows, capacity, heads, 64) in boxes of so many positions of a head.
bool encode_cache(CUtensorMap& map, const StepParams& p, const void* data, const int64_t (&stride)[4], int positions) {
  return encode(map, p.dtype, data, {kDim, p.capacity, p.heads_kv, p.cache_rows, p.layers},
                {stride[2] * 2, stride[3] * 2, stride[1] * 2, stride[0] * 2}, {kDim, positions, 1, 1, 1});
}

bool encode_all(Args& args) {
  const StepParams& p = args.p;
  constexpr int64_t kRow = kHidden * 2;
  bool done = encode_matrix(args.qkv, p.dtype, p.qkv, p.layers * 3 * kHidden, kHidden, kDim, kColumns / 64) &&
              encode_matrix(args.out, p.dtype, p.out, p.layers * kHidden, kHidden, kColumns, 1) &&
              encode_matrix(args.down, p.dtype, p.down, p.layers * kHidden, kIntermediate, kColumns, 1) &&
              // 64 columns of either half, of gate and of up
              encode(args.gate_up, p.dtype, p.gate_up, {kHidden / 2, kIntermediate, 2, 2, p.layers},
                     {kRow, kIntermediate * kRow, kHidden, 2 * kIntermediate * kRow}, {64, kShare, 2, 2, 1}) &&
              encode(args.head, p.dtype, p.head, {kHidden / 2, p.vocab, 2}, {kRow, kHidden}, {64, 64, 2});
  for (int i = 0; i < 8; ++i) {
    done = done && encode_cache(args.keys[i], p, p.k_cache, p.k_stride, 8 * i + 8) &&
           encode_cache(args.values[i], p, p.v_cache, p.v_stride, 8 * i + 8);
  }
  return done;
}

template <typename T>
cudaError_t launch(const StepParams& p, cudaStream_t stream) {
  Args args;
  args.p = p;
  args.in_flight_attention = std::min(args.in_flight_attention, kMostInFlight);
  args.in_flight_products = std::min(args.in_flight_products, kMostInFlight);
  if (!encode_all(args)) return cudaErrorInvalidValue;
  const auto kernel = mesh_kernel<T>;
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

/// A head's keys are contiguous, and rows of all caches 16-byte aligned.
bool is_streamable(const int64_t (&stride)[4]) {
  return stride[2] == kDim && stride[0] % 8 == 0 && stride[1] % 8 == 0 && stride[3] % 8 == 0;
}

}  // namespace

bool step_mesh_supported(const StepParams& p) {
  if ((p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) || p.arch < 90 || p.arch >= 100) return false;
  if (p.rows < 1 || p.rows > kMaxRows || p.probes != nullptr) return false;
  if (p.heads != kHeads || p.heads_kv != kHeads || p.head_dim != kDim || p.hidden != kHidden ||
      p.intermediate != kIntermediate)
    return false;
  if (p.layers < 2 || p.layers % 2 != 0 || p.layers > (1 << 14)) return false;  // see mesh_vector.cuh
  if (p.vocab < 1 || p.vocab > (1 << 24) || p.capacity < 1 || p.capacity > (1 << 24)) return false;
  if (!is_streamable(p.k_stride) || !is_streamable(p.v_stride)) return false;
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return major == 9 && minor == 0 && multiprocessors >= kCtas && sm90::encode_tiled() != nullptr;
}

size_t step_mesh_workspace(const StepParams&) { return Layout::bytes; }

cudaError_t step_mesh(const StepParams& p, cudaStream_t stream) {
  if (!step_mesh_supported(p) || p.workspace_bytes < step_mesh_workspace(p)) return cudaErrorInvalidValue;
  return p.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace vivace
