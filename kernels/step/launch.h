// Launchers of the CUDA token step. Each launches on `stream`, allocates nothing and never synchronises, so it can be
// captured in a CUDA graph. The device is the current one. *_supported answers for a shape on this device (pointers of
// `params` are not looked at, but whether probes is null may be), *_workspace says how many bytes of params.workspace the
// family wants for it.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/step/step.h"

namespace vivace {

/// The whole step as one persistent kernel, for few rows. Its workspace does not depend on `rows`: csrc puts the other
/// families' behind it.
bool step_persistent_supported(const StepParams& params);
size_t step_persistent_workspace(const StepParams& params);
cudaError_t step_persistent(const StepParams& params, cudaStream_t stream);

/// The whole step as one persistent kernel, for many rows: a part of them in attention while another is in the products.
/// More than 256 rows are several launches. Its workspace does not depend on `rows` either.
bool step_split_supported(const StepParams& params);
size_t step_split_workspace(const StepParams& params);
cudaError_t step_split(const StepParams& params, cudaStream_t stream);

/// The whole step as one persistent kernel over a mesh of CTAs, for up to 64 rows. Its workspace does not depend on `rows`.
bool step_mesh_supported(const StepParams& params);
size_t step_mesh_workspace(const StepParams& params);
cudaError_t step_mesh(const StepParams& params, cudaStream_t stream);

/// A chain of kernels under programmatic dependent launch, for any number of rows up to its limit.
bool step_chain_supported(const StepParams& params);
size_t step_chain_workspace(const StepParams& params);
cudaError_t step_chain(const StepParams& params, cudaStream_t stream);

}  // namespace vivace
