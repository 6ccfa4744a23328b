#pragma once

#include <cuda_runtime_api.h>

#include "kernels/activation/silu_gate.h"

namespace vivace {

/// Launches on `stream`; allocates nothing and never synchronises, so it can be captured in a CUDA graph.
cudaError_t silu_gate_cuda(const SiluGateParams& params, cudaStream_t stream);

}  // namespace vivace
