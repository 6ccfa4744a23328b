#include "host/device.h"

#include <ATen/ATen.h>
#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <mutex>
#include <optional>
#include <tuple>

#include "host/error.h"
#include "host/operators.h"

#ifdef VIVACE_WITH_CUDA
#if __has_include(<cublas_v2.h>) && __has_include(<cusparse.h>) && __has_include(<cusolverDn.h>)
#include <ATen/cuda/CUDAContextLight.h>
#define VIVACE_WITH_CUBLAS_WORKSPACES 1
#endif
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace vivace {
namespace {

/// "MemAvailable: 123 kB" of /proc/meminfo and its like; empty when the key is not there.
std::string proc_value(const char* file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(key, 0) != 0) continue;
    const size_t begin = line.find_first_not_of(" \t", line.find(':') + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

#ifdef VIVACE_WITH_CUDA
struct CudaMemory {
  int64_t free, total;  // bytes
};
CudaMemory cuda_memory(c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  size_t free = 0, total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}
#endif

}  // namespace

int cuda_device_count() {
#ifdef VIVACE_WITH_CUDA
  return static_cast<int>(c10::cuda::device_count());  // 0, and no exception, without a driver
#else
  return 0;
#endif
}

c10::Device resolve_device(const std::string& name) {
  if (name == "cpu") return c10::Device(c10::kCPU);
  if (name == "auto") {
    return cuda_device_count() > 0 && operators_have_cuda() ? c10::Device(c10::kCUDA, 0) : c10::Device(c10::kCPU);
  }
  int index = 0;
  bool known = name == "cuda";
  if (name.rfind("cuda:", 0) == 0) {
    const char* end = name.data() + name.size();
    const auto [rest, status] = std::from_chars(name.data() + 5, end, index);
    known = status == std::errc() && rest == end && index >= 0;
  }
  check(known, "device", "device is ", printable(name), ", expected auto, cpu, cuda or cuda:<index>");
#ifdef VIVACE_WITH_CUDA
  check(cuda_device_count() > 0, "device", "device is ", printable(name), ", but there is no usable CUDA device or driver");
  check(index < cuda_device_count(), "device", "device is ", printable(name), ", but there are ", cuda_device_count(),
        " CUDA devices");
  check(operators_have_cuda(), "device", "device is ", printable(name), ", but the operator library was built without CUDA");
#else
  throw Error("vivace.device: device is " + printable(name) + ", but this vivace was built without CUDA");
#endif
  return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
}

std::string device_name([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) {
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device.index()));
    return properties.name;
  }
#endif
  return proc_value("/proc/cpuinfo", "model name");
}

int64_t free_memory([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) return cuda_memory(device).free;
#endif
  const std::string available = proc_value("/proc/meminfo", "MemAvailable");  // "123456 kB"
  int64_t kib = 0;
  std::from_chars(available.data(), available.data() + available.size(), kib);
  return kib * 1024;
}

int64_t used_memory([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) {
    const CudaMemory memory = cuda_memory(device);
    return memory.total - memory.free;
  }
#endif
  return 0;
}

int64_t peak_memory([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
    return stats.reserved_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  }
#endif
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

namespace {
template <typename T>
at::Tensor upload_values(const std::vector<T>& values, c10::Device device, at::ScalarType dtype) {
  // From pinned memory, which the host's allocator keeps until the copy is done.
  const auto options = at::TensorOptions().dtype(dtype).pinned_memory(device.is_cuda());
  const at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, options);
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<T>());
  return host.to(device, /*non_blocking=*/true);
}
}  // namespace

at::Tensor upload(const std::vector<int32_t>& values, c10::Device device) { return upload_values(values, device, at::kInt); }
at::Tensor upload(const std::vector<int64_t>& values, c10::Device device) {
  return upload_values(values, device, at::kLong);
}

#ifdef VIVACE_WITH_CUDA
/// A stream of our own: torch's pool makes 128 at once, which takes 70 MB of the device.
struct StreamScope::Guard {
  explicit Guard(c10::Device device)
      : on_device(device), stream(make()), scope(c10::cuda::getStreamFromExternal(stream, device.index())) {}
  ~Guard() {
    forget_workspaces();
    scope.reset();
    (void)cudaStreamDestroy(stream);
  }
  static cudaStream_t make() {
    cudaStream_t made = nullptr;
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }
  /// torch keeps a workspace of cuBLAS for every stream that has used it, for ever.
  void forget_workspaces() const {
#ifdef VIVACE_WITH_CUBLAS_WORKSPACES
    for (auto* kept : {&at::cuda::cublas_handle_stream_to_workspace(), &at::cuda::cublaslt_handle_stream_to_workspace()}) {
      const std::unique_lock lock(kept->mutex);
      std::erase_if(kept->map, [&](const auto& entry) { return std::get<1>(entry.first) == stream; });
    }
#endif
  }
  c10::cuda::CUDAGuard on_device;
  cudaStream_t stream;
  std::optional<c10::cuda::CUDAStreamGuard> scope;
};
#else
struct StreamScope::Guard {};
#endif

void shrink_stack([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (!device.is_cuda()) return;
  const c10::cuda::CUDAGuard guard(device);
  if (cudaDeviceSetLimit(cudaLimitStackSize, 128) != cudaSuccess) (void)cudaGetLastError();  // it stays as it was
#endif
}

void release_memory([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) c10::cuda::CUDACachingAllocator::emptyCache();
#endif
}

void synchronize([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) c10::cuda::getCurrentCUDAStream(device.index()).synchronize();
#endif
}

StreamScope::StreamScope([[maybe_unused]] c10::Device device) {
#ifdef VIVACE_WITH_CUDA
  if (device.is_cuda()) guard_ = std::make_unique<Guard>(device);
#endif
}
StreamScope::~StreamScope() = default;

void StreamScope::synchronize() const {
#ifdef VIVACE_WITH_CUDA
  if (guard_) C10_CUDA_CHECK(cudaStreamSynchronize(guard_->stream));
#endif
}

}  // namespace vivace
