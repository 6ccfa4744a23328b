#include "csrc/arch.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "csrc/error.h"

namespace vivace {

namespace {

bool is_arch(int64_t arch) { return arch == 0 || arch == 80 || arch == 90 || arch == -1; }

int64_t arch_from_environment() {
  const char* text = std::getenv("VIVACE_ARCH");
  if (text == nullptr || *text == '\0') return 0;
  const std::string value = text;
  if (value == "auto") return 0;
  if (value == "generic") return -1;
  char* end = nullptr;
  const long arch = std::strtol(text, &end, 10);
  check(*end == '\0' && is_arch(arch), "force_arch", "the environment's VIVACE_ARCH is \"", value,
        "\", expected auto (0), 80, 90 or generic (-1)");
  return arch;
}

std::atomic<int64_t>& current_arch() {
  static std::atomic<int64_t> arch{arch_from_environment()};
  return arch;
}

}  // namespace

int64_t forced_arch() { return current_arch().load(std::memory_order_relaxed); }

int64_t force_arch(int64_t arch) {
  check(is_arch(arch), "force_arch", "arch is ", arch, ", expected 0 (automatic), 80, 90 or -1 (generic)");
  return current_arch().exchange(arch);
}

#ifdef VIVACE_WITH_CUDA

void check_cuda(const char* op, const char* kernel, cudaError_t status) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // so that the next call does not report this one's error
  check(false, op, "CUDA error in ", kernel, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

CudaDevice cuda_device(int device_index) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // capability << 16 | multiprocessors; 0: not asked yet
  check(device_index >= 0 && device_index < kMaxDevices, "cuda_device", "device index is ", device_index, ", expected 0 to ",
        kMaxDevices - 1);
  int packed = known[device_index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    check_cuda("cuda_device", "cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index));
    check_cuda("cuda_device", "cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index));
    check_cuda("cuda_device", "cudaDeviceGetAttribute",
               cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_index));
    packed = (major * 10 + minor) << 16 | multiprocessors;
    known[device_index].store(packed, std::memory_order_relaxed);
  }
  return CudaDevice{packed >> 16, packed & 0xffff};
}

void check_device(const char* op, DeviceType device, int device_index) {
  if (device == DeviceType::kCpu) return;
  const CudaDevice cuda = cuda_device(device_index);
  if (cuda.capability >= 80) [[likely]]
    return;
  check(false, op, "the tensors are on cuda:", device_index, ", a GPU of compute capability ", cuda.capability / 10, ".",
        cuda.capability % 10, "; the CUDA kernels need 8.0 (Ampere) or newer");
}

#else

void check_device(const char* op, DeviceType device, int device_index) {
  if (device == DeviceType::kCpu) return;
  check(false, op, "the tensors are on cuda:", device_index,
        ", but this libvivace_ops.so was built for the CPU only; build vivace with nvcc (VIVACE_CUDA=on), or move them to "
        "the CPU");
}

#endif

}  // namespace vivace
