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

}  // namespace vivace::mesh
