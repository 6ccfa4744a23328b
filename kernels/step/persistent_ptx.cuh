// What the persistent step uses of the machine beyond kernels/common: packets between CTAs.
#pragma once

#include <cstdint>

#include "kernels/step/step_ptx.cuh"

namespace vivace::step {

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

/// Looks before a wait is an error.
inline constexpr uint32_t kMaxTurns = 1u << 23;

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait<kMaxTurns>(barrier, parity);
}

}  // namespace vivace::step
