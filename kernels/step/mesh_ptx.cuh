// What the mesh step uses of the machine beyond kernels/common and step_ptx.cuh.
#pragma once

#include <cstdint>

#include "kernels/common/tma.cuh"

namespace vivace::mesh {

/// mbarrier.arrive, `count` times
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(sm90::smem_address(barrier)), "r"(count) : "memory");
}

/// st.relaxed.gpu of a word.
__device__ __forceinline__ void store_relaxed(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

/// v = step::load_b128(p) if `there`. One instruction under a predicate: of a load under a condition the compiler would make
/// copies, all of them behind the last of the loads that are under way.
__device__ __forceinline__ void load_b128_if(uint4& v, const void* p, bool there) {
  uint64_t low = v.x | static_cast<uint64_t>(v.y) << 32, high = v.z | static_cast<uint64_t>(v.w) << 32;
  asm volatile(
      "{\n.reg .b128 x;\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.b128 x, {%0, %1};\n"
      "@p ld.relaxed.gpu.global.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}\n"
      : "+l"(low), "+l"(high)
      : "l"(p), "r"(static_cast<int>(there))
      : "memory");
  v = make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                 static_cast<uint32_t>(high >> 32));
}

}  // namespace vivace::mesh
