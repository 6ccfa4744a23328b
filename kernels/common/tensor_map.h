// How launchers make tensor maps for Hopper's copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "kernels/common/dtype.h"

namespace vivace::sm90 {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// cuTensorMapEncodeTiled, found at run time: no link to libcuda.
inline EncodeTiled encode_tiled() {
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

/// Describes a tensor of 16-bit elements to the copy engine, swizzled by 128 bytes: sizes and box from the innermost
/// dimension on, in elements; strides of all but that one, in bytes. `promotion` is how much L2 reads at a time. False
/// where the engine does not take it; what a load reads past an end is 0. encode_tiled() must be there.
inline bool encode_tensor_map(CUtensorMap& map, DType dtype, const void* data, std::initializer_list<int64_t> sizes,
                              std::initializer_list<int64_t> strides, std::initializer_list<int> box,
                              CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  cuuint64_t size[5], stride[5];
  cuuint32_t boxes[5], element_strides[5] = {1, 1, 1, 1, 1};
  std::copy(sizes.begin(), sizes.end(), size);
  std::copy(strides.begin(), strides.end(), stride);
  std::copy(box.begin(), box.end(), boxes);
  const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_tiled()(&map, type, static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data), size, stride, boxes,
                        element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace vivace::sm90
