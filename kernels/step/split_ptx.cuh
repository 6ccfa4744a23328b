// What the split step uses of the machine beyond kernels/common: counters in global memory, bounded waits, copies.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/common/tma.cuh"

namespace vivace::split {

/// The block's dynamic shared memory, aligned for the 128-byte swizzle.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t split_shared[];
  return split_shared;
}

/// ld.acquire.gpu
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
/// red.release.gpu.add of 1
__device__ __forceinline__ void add_release(uint32_t* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
/// fence.proxy.async of global memory: between ordinary accesses and those of the copy engine.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// Ends the grid with an error: a store to address 0. With a trap ptxas would keep all warps to the registers of the launch
/// bounds, whatever setmaxnreg says.
__device__ __forceinline__ void fail() { asm volatile("st.global.u32 [%0], %1;" ::"l"(uint64_t{0}), "r"(0) : "memory"); }

/// Waits until a counter has come to `target`; counters may wrap. Some seconds at most.
__device__ __forceinline__ void wait_counter(const uint32_t* counter, uint32_t target) {
  for (uint32_t turns = 0; static_cast<int32_t>(load_acquire(counter) - target) < 0;) {
    if (++turns > (1u << 22)) fail();
  }
}

/// mbarrier.try_wait.parity until the phase of `parity` has completed. Some seconds at most.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const uint32_t address = sm90::smem_address(barrier);
  for (uint32_t turns = 0;;) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
    if (done) return;
    if (++turns > (1u << 22)) fail();
  }
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
