// Launches a kernel, if asked as a programmatic dependent of the one before in its stream (Hopper and newer): it may start
// while that one still runs, and must execute griddepcontrol.wait (ptx::grid_dependency_wait) before it touches memory.
#pragma once

#include <cuda_runtime.h>

namespace vivace {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes,
                          cudaStream_t stream, bool dependent, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace vivace
