// Launchers of the chain's products. Each launches on `stream` and returns cudaErrorNotSupported where its family does not
// cover the call. `dependent`: under programmatic dependent launch, before the kernel in front has ended.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/step/linear.h"

namespace vivace {

/// A launch with the attributes that the chain needs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_linked(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, int cluster,
                          bool dependent, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

/// mma.sync, for sm_80 and newer. Features of a part of `squares`: 16. Any k that is a multiple of 32.
inline constexpr int kSquareWidthSm80 = 16;
cudaError_t linear_sm80(Matrix matrix, DType dtype, const LinearArgs& args, bool dependent, cudaStream_t stream);

/// wgmma, for Hopper. Features of a part of `squares`: 64. args.weight and args.x lie behind the maps: the stack of the
/// matrix over the layers in boxes of linear_sm90_weight_rows(matrix) rows, and x in boxes of linear_sm90_rows(matrix,
/// rows).
inline constexpr int kSquareWidthSm90 = 64;
cudaError_t linear_sm90(Matrix matrix, DType dtype, const LinearArgs& args, const CUtensorMap& weight, const CUtensorMap& x,
                        bool dependent, cudaStream_t stream);
/// Whether a matrix of this shape can be split as the kernel wants it.
bool linear_sm90_supports(Matrix matrix, int64_t features, int64_t k);
int linear_sm90_rows(Matrix matrix, int64_t rows);
constexpr int linear_sm90_weight_rows(Matrix matrix) { return matrix == Matrix::kGateUp ? 32 : 64; }
/// A (rows, columns) matrix in boxes of `box_rows` rows and 64 columns; false where the copy engine cannot.
bool linear_sm90_map(CUtensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns, int box_rows);

}  // namespace vivace
