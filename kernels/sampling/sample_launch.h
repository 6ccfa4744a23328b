#pragma once

#include <cuda_runtime_api.h>

#include "kernels/sampling/sample.h"

namespace vivace {

/// Launches on `stream`; allocates nothing and never synchronises, so it can be captured in a CUDA graph.
cudaError_t sample_cuda(const SampleParams& params, cudaStream_t stream);

}  // namespace vivace
