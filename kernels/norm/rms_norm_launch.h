#pragma once

#include <cuda_runtime_api.h>

#include "kernels/norm/rms_norm.h"

namespace vivace {

/// Launches on `stream`; allocates nothing and never synchronises, so it can be captured in a CUDA graph.
cudaError_t rms_norm_cuda(const RmsNormParams& params, cudaStream_t stream);

}  // namespace vivace
