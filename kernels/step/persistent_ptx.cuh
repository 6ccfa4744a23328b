// What the persistent step uses of the machine beyond kernels/common: packets between CTAs.
#pragma once

#include <cstdint>

#include "kernels/step/step_ptx.cuh"

namespace vivace::step {

/// A packet of 16 bytes.
__device__ __forceinline__ uint4 load_packet(const uint4* p) { return load_b128(p); }
__device__ __forceinline__ void store_packet(uint4* p, uint32_t x, uint32_t y, uint32_t z, uint32_t tag) {
  store_b128(p, make_uint4(x, y, z, tag));
}
/// ld.relaxed.gpu.b64 and st.relaxed.gpu.b64: one of 8 bytes.
__device__ __forceinline__ uint2 load_packet(const uint2* p) {
  uint64_t x;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return make_uint2(static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32));
}
__device__ __forceinline__ void store_packet(uint2* p, uint32_t x, uint32_t tag) {
  const uint64_t v = x | static_cast<uint64_t>(tag) << 32;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

/// ld.relaxed.gpu, of what is read once, beside other loads: plain ones the compiler moves behind the branches that want
/// them, a trip to memory each.
__device__ __forceinline__ int load_now(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

/// %globaltimer: nanoseconds, in steps of up to a microsecond.
__device__ __forceinline__ int64_t global_ns() {
  int64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

/// Looks before a wait is an error.
inline constexpr uint32_t kMaxTurns = 1u << 23;

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait<kMaxTurns>(barrier, parity);
}

}  // namespace vivace::step
