// Which kernel family runs, and what the CUDA device is.
#pragma once

#include <cstdint>

#ifdef VIVACE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "csrc/tensor_view.h"

namespace vivace {

/// 0: by the device; 80: the mma.sync kernels; 90: Hopper's, where there are such; -1: the generic kernels.
/// Starts as the environment's VIVACE_ARCH.
int64_t forced_arch();
/// Sets it and returns the previous value; throws Error on any other value.
int64_t force_arch(int64_t arch);

/// Throws Error unless `device` can run the operators: a CPU, or in a CUDA build a GPU of compute capability 8.0 or newer.
void check_device(const char* op, DeviceType device, int device_index);

#ifdef VIVACE_WITH_CUDA
struct CudaDevice {
  int capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
};
/// Asked of the driver once per device.
CudaDevice cuda_device(int device_index);

/// Throws Error("vivace.<op>: CUDA error <text> in <kernel> (<name>)") unless `status` is cudaSuccess.
void check_cuda(const char* op, const char* kernel, cudaError_t status);
#endif

}  // namespace vivace
