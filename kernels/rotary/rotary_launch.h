#pragma once

#include <cuda_runtime_api.h>

#include "kernels/rotary/rotary.h"

namespace vivace {

/// Launches on `stream`; allocates nothing and never synchronises, so it can be captured in a CUDA graph.
cudaError_t rotary_cuda(const RotaryParams& params, cudaStream_t stream);

}  // namespace vivace
