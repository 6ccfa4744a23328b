// What the persistent step uses of the machine beyond kernels/common: packets between CTAs, bounded waits.
#pragma once

#include <cstdint>

#include "kernels/common/ptx.cuh"
#include "kernels/common/tma.cuh"

namespace vivace::step {

/// The block's dynamic shared memory, aligned for the 128-byte swizzle.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t step_shared[];
  return step_shared;
}

/// ld.relaxed.gpu.b128: 16 bytes as one access, so that a packet is seen whole or not at all.
__device__ __forceinline__ uint4 load_packet(const uint4* p) {
  uint64_t lo, hi;
  asm volatile("{\n.reg .b128 t;\nld.relaxed.gpu.global.b128 t, [%2];\nmov.b128 {%0, %1}, t;\n}\n"
               : "=l"(lo), "=l"(hi)
               : "l"(p)
               : "memory");
  return make_uint4(static_cast<uint32_t>(lo), static_cast<uint32_t>(lo >> 32), static_cast<uint32_t>(hi),
                    static_cast<uint32_t>(hi >> 32));
}
/// st.relaxed.gpu.b128
__device__ __forceinline__ void store_packet(uint4* p, uint32_t x, uint32_t y, uint32_t z, uint32_t tag) {
  const uint64_t lo = x | static_cast<uint64_t>(y) << 32, hi = z | static_cast<uint64_t>(tag) << 32;
  asm volatile("{\n.reg .b128 t;\nmov.b128 t, {%0, %1};\nst.relaxed.gpu.global.b128 [%2], t;\n}\n" ::"l"(lo), "l"(hi), "l"(p)
               : "memory");
}
/// ld.relaxed.gpu.b64 and st.relaxed.gpu.b64: the same for 8 bytes.
__device__ __forceinline__ uint2 load_packet(const uint2* p) {
  uint64_t x;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return make_uint2(static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32));
}
__device__ __forceinline__ void store_packet(uint2* p, uint32_t x, uint32_t tag) {
  const uint64_t v = x | static_cast<uint64_t>(tag) << 32;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/// x, but the compiler does not know: what is computed from it is not kept in registers from layer to layer.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// Ends the grid with an error, an illegal address. Not by `trap`: with one anywhere in a kernel, ptxas (13.0) does not give
/// the consumers the registers of setmaxnreg, but spills.
__device__ __forceinline__ void fail() { asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }

/// Ends a wait that can only be a deadlock: some seconds.
struct Watchdog {
  uint32_t turns = 0;
  __device__ __forceinline__ void check() {
    if (++turns > (1u << 23)) fail();
  }
};

/// mbarrier.try_wait.parity: whether the phase of `parity` has completed, after a bounded suspension.
__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(sm90::smem_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  Watchdog watchdog;
  while (!barrier_try_wait(barrier, parity)) watchdog.check();
}

}  // namespace vivace::step
