// What launchers need to know of the current device, asked of the driver once.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace vivace {

struct DeviceFacts {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int l2_bytes;
};

/// Of the current device. The status is the driver's where it does not answer.
inline cudaError_t device_facts(int& device, DeviceFacts& facts) {
  constexpr int kMaxDevices = 64;
  static std::atomic<bool> known[kMaxDevices];
  static DeviceFacts all[kMaxDevices];
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (!known[device].load(std::memory_order_acquire)) {
    int major = 0, minor = 0, multiprocessors = 0, l2_bytes = 0;
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
    if (status != cudaSuccess) return status;
    static std::atomic_flag writing = ATOMIC_FLAG_INIT;
    while (writing.test_and_set(std::memory_order_acquire)) {
    }
    all[device] = DeviceFacts{10 * major + minor, multiprocessors, l2_bytes};
    known[device].store(true, std::memory_order_release);
    writing.clear(std::memory_order_release);
  }
  facts = all[device];
  return cudaSuccess;
}

/// Lets `kernel` have `bytes` of dynamic shared memory on `device`: the driver is asked at the first launch there. `done` is
/// the kernel's own, a bit a device.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes, int device, std::atomic<uint64_t>& done) {
  const uint64_t bit = uint64_t{1} << device;
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return status;
}

}  // namespace vivace
