// What the split step uses of the machine beyond kernels/common: counters in global memory, copies.
#pragma once

#include <cstdint>

#include "kernels/step/step_ptx.cuh"

namespace vivace::split {

using step::dynamic_shared;
using step::elect;

/// Looks before a wait is an error: some 20 seconds, since a tool that records every access slows a step to several.
inline constexpr uint32_t kMaxTurns = 1u << 26;

/// ld.acquire.gpu
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
/// ld.relaxed.gpu
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
/// fence.acquire.gpu: what was released with the values that relaxed loads have seen happened before what follows. It costs
/// nothing that ld.acquire does not, where fence.acq_rel would wait for this thread's own accesses, too.
__device__ __forceinline__ void fence_acquire() { asm volatile("fence.acquire.gpu;" ::: "memory"); }
/// red.release.gpu.add
__device__ __forceinline__ void add_release(uint32_t* p, uint32_t n = 1) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
/// red.relaxed.gpu.add
__device__ __forceinline__ void add_relaxed(uint32_t* p, uint32_t n = 1) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
/// atom.relaxed.gpu.add of 1: what was there before.
__device__ __forceinline__ uint32_t add_and_get(uint32_t* p) {
  uint32_t x;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(x) : "l"(p) : "memory");
  return x;
}

// What other CTAs read is accessed with the policy evict-last: without it, the stream of weights and keys evicts the lines
// between their uses, and stores and looks wait for memory.

/// A plain store.
__device__ __forceinline__ void store_kept(void* p, uint32_t x) {
  asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(p), "r"(x), "l"(sm90::kEvictLast) : "memory");
}
/// ld.relaxed.gpu: 16 bytes whose words are there or not, each for itself.
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p), "l"(sm90::kEvictLast)
               : "memory");
  return x;
}
/// The same of two sums: 0 (not -0) is one that is not there.
__device__ __forceinline__ float2 load_relaxed(const float2* p) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.L2::cache_hint.v2.f32 {%0, %1}, [%2], %3;"
               : "=f"(x.x), "=f"(x.y)
               : "l"(p), "l"(sm90::kEvictLast)
               : "memory");
  return x;
}
__device__ __forceinline__ bool is_there(float2 x) { return __float_as_uint(x.x) != 0 && __float_as_uint(x.y) != 0; }
/// st.relaxed.gpu
__device__ __forceinline__ void store_relaxed(float2* p, float2 x) {
  asm volatile("st.relaxed.gpu.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, %3;" ::"l"(p), "f"(x.x), "f"(x.y),
               "l"(sm90::kEvictLast)
               : "memory");
}
__device__ __forceinline__ void store_relaxed(uint4* p, uint4 x) {
  asm volatile("st.relaxed.gpu.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w), "l"(sm90::kEvictLast)
               : "memory");
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(p), "r"(x), "l"(sm90::kEvictLast) : "memory");
}
__device__ __forceinline__ bool all_lanes(bool x) { return __all_sync(~0u, x); }

/// fence.proxy.async of global memory: between ordinary accesses and those of the copy engine.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Waits until a counter has come to `target`; counters may wrap.
__device__ __forceinline__ void wait_counter(const uint32_t* counter, uint32_t target) {
  step::Watchdog<kMaxTurns> watchdog;
  while (static_cast<int32_t>(load_relaxed(counter) - target) < 0) watchdog.check();
  fence_acquire();
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
