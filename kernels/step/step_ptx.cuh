// What the kernels that are a whole step (persistent, mesh, split) use of the machine beyond kernels/common: their shared
// memory, and waits that end. A packet or count that never comes would otherwise hang the device.
#pragma once

#include <cstdint>

#include "kernels/common/tma.cuh"
#include "kernels/step/step.h"

namespace vivace::step {

/// The block's dynamic shared memory, aligned for the 128-byte swizzle.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t step_shared[];
  return step_shared;
}

/// elect.sync: true for one lane of a whole warp. ptxas then knows that it is one, and copies take their operands from
/// uniform registers without a loop over lanes.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

/// Ends the grid with an error, an illegal address: a store to address 0. Not by `trap`: with one anywhere in a kernel,
/// ptxas (13.0) keeps all warps to the registers of the launch bounds, whatever setmaxnreg gives them, and spills.
__device__ __forceinline__ void fail() { asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }

/// Ends a wait that can only be a deadlock: kTurns looks are a second and more, a step takes milliseconds.
template <uint32_t kTurns>
struct Watchdog {
  uint32_t turns = 0;
  __device__ __forceinline__ void check() {
    if (++turns > kTurns) fail();
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
template <uint32_t kTurns>
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  Watchdog<kTurns> watchdog;
  while (!barrier_try_wait(barrier, parity)) watchdog.check();
}

/// ld.relaxed.gpu.b128: 16 bytes as one access of the memory model, seen whole or not at all.
__device__ __forceinline__ uint4 load_b128(const void* p) {
  uint64_t low, high;
  asm volatile("{\n.reg .b128 x;\nld.relaxed.gpu.global.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}\n"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}
/// st.relaxed.gpu.b128
__device__ __forceinline__ void store_b128(void* p, uint4 v) {
  asm volatile("{\n.reg .b128 x;\nmov.b128 x, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], x;\n}\n" ::"l"(p),
               "l"(v.x | static_cast<uint64_t>(v.y) << 32), "l"(v.z | static_cast<uint64_t>(v.w) << 32)
               : "memory");
}

/// Keys of a row that were there before the step.
__device__ __forceinline__ int old_keys(const StepParams& p, int row) {
  if (p.cache_batch_idx[row] < 0) return 0;
  return max(0, min(p.cache_seqlens[row], static_cast<int>(p.capacity)));
}
/// Where the step's key goes; -1: nowhere.
__device__ __forceinline__ int newest_key(const StepParams& p, int row) {
  const int n = p.cache_seqlens[row];
  return p.cache_batch_idx[row] >= 0 && n >= 0 && n < p.capacity ? n : -1;
}

}  // namespace vivace::step
