// What the mesh step uses of the machine beyond kernels/common and step_ptx.cuh.
#pragma once

#include <cstdint>

#include "kernels/common/tma.cuh"

namespace vivace::mesh {

/// mbarrier.arrive
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sm90::smem_address(barrier)) : "memory");
}

/// mbarrier.arrive, `count` times
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(sm90::smem_address(barrier)), "r"(count) : "memory");
}

/// ld.relaxed.gpu and st.relaxed.gpu of 16 bytes at once, and of a word.
__device__ __forceinline__ uint4 load_relaxed(const void* p) {
  uint64_t low, high;
  asm volatile("{\n.reg .b128 x;\nld.relaxed.gpu.global.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}\n"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}
__device__ __forceinline__ void store_relaxed(void* p, uint4 v) {
  asm volatile("{\n.reg .b128 x;\nmov.b128 x, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], x;\n}\n" ::"l"(p),
               "l"(v.x | static_cast<uint64_t>(v.y) << 32), "l"(v.z | static_cast<uint64_t>(v.w) << 32)
               : "memory");
}
__device__ __forceinline__ void store_relaxed(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

}  // namespace vivace::mesh
