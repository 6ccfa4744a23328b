#pragma once

#include <cuda_runtime_api.h>

#include "kernels/sampling/sample.h"

namespace vivace {

/// Launches one kernel on `stream`, under programmatic dependent launch where there is such; allocates nothing and never
/// synchronises, so it can be captured in a CUDA graph. cluster: CTAs a request (1, 2, 4, 8), 0: by their number; the tokens
/// are the same.
cudaError_t sample_cuda(const SampleParams& params, cudaStream_t stream, int cluster = 0);

}  // namespace vivace
