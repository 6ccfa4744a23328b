// Tensor maps of the kernels that are a whole step, and the device that they want.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/common/tensor_map.h"
#include "kernels/step/step.h"

namespace vivace::step {

/// As sm90::encode_tensor_map. L2 reads 128 bytes at a time: 256, which suit a tile that others read again, made steps of 1
/// to 128 rows 1 to 3 % slower.
inline bool encode_map(CUtensorMap& map, DType dtype, const void* data, std::initializer_list<int64_t> sizes,
                       std::initializer_list<int64_t> strides, std::initializer_list<int> box) {
  return sm90::encode_tensor_map(map, dtype, data, sizes, strides, box, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

/// A matrix (outputs, inputs) in boxes of `rows` outputs and `groups` groups of 64 inputs.
inline bool encode_matrix(CUtensorMap& map, DType dtype, const void* data, int64_t outputs, int64_t inputs, int rows,
                          int groups) {
  return encode_map(map, dtype, data, {64, outputs, inputs / 64}, {inputs * 2, 128}, {64, rows, groups});
}

/// A cache (layers, cache_rows, capacity, heads, 64) in boxes of so many positions of a head.
inline bool encode_cache(CUtensorMap& map, const StepParams& p, const void* data, const int64_t (&stride)[4],
                         int positions) {
  return encode_map(map, p.dtype, data, {64, p.capacity, p.heads_kv, p.cache_rows, p.layers},
                    {stride[2] * 2, stride[3] * 2, stride[1] * 2, stride[0] * 2}, {64, positions, 1, 1, 1});
}

/// Whether a head's keys in a cache are contiguous, and its rows 16-byte aligned.
inline bool has_contiguous_keys(const int64_t (&stride)[4]) {
  return stride[2] == 64 && stride[0] % 8 == 0 && stride[1] % 8 == 0 && stride[3] % 8 == 0;
}

/// Whether the current device is of compute capability 9.0, has so many multiprocessors and a driver that makes maps.
inline bool is_hopper_with(int64_t multiprocessors) {
  int device = 0, major = 0, minor = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return major == 9 && minor == 0 && count >= multiprocessors && sm90::encode_tiled() != nullptr;
}

}  // namespace vivace::step
