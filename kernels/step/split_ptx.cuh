// What the split step uses of the machine beyond kernels/common: counters in global memory, copies.
#pragma once

#include <cstdint>

#include "kernels/step/step_ptx.cuh"

namespace vivace::split {

using step::dynamic_shared;

/// Looks before a wait is an error.
inline constexpr uint32_t kMaxTurns = 1u << 22;

/// ld.acquire.gpu
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
/// red.release.gpu.add
__device__ __forceinline__ void add_release(uint32_t* p, uint32_t n = 1) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
/// ld.relaxed.gpu: 16 bytes whose words are there or not, each for itself.
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}
/// st.relaxed.gpu
__device__ __forceinline__ void store_relaxed(uint4* p, uint4 x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ bool all_lanes(bool x) { return __all_sync(~0u, x); }

/// fence.proxy.async of global memory: between ordinary accesses and those of the copy engine.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Waits until a counter has come to `target`; counters may wrap.
__device__ __forceinline__ void wait_counter(const uint32_t* counter, uint32_t target) {
  step::Watchdog<kMaxTurns> watchdog;
  while (static_cast<int32_t>(load_acquire(counter) - target) < 0) watchdog.check();
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  step::barrier_wait<kMaxTurns>(barrier, parity);
}
/// cp.async.bulk: `bytes` (a multiple of 16) from global to shared memory; completes on `barrier`.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier,
                                          uint64_t hint) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          sm90::smem_address(destination)),
      "l"(source), "r"(bytes), "r"(sm90::smem_address(barrier)), "l"(hint)
      : "memory");
}

}  // namespace vivace::split
