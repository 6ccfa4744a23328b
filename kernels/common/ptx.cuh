// One PTX instruction a function, by the name in its comment. sm_80 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vivace::ptx {

/// cvta.to.shared: the 32-bit address of shared memory that the instructions below take.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8
/// of matrix l / 8; r[i] holds elements 2 * (lane % 4) + {0, 1} of row lane / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16: as above, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}: d (16x8) += a (16x16) * b (16x8), with r = lane / 4, c = 2 * (lane %
/// 4): d rows r (d[0], d[1]) and r + 8 (d[2], d[3]), columns c and c + 1; a (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8),
/// two columns each; b rows c, c + 1 (b0) and c + 8, c + 9 (b1) of column r.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// cp.async.cg.shared.global: copies 16 bytes past L1. With bytes < 16 the rest is zeros; with 0 `global` is not read.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

/// cp.async.commit_group: what was issued since the last commit becomes one group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

/// cp.async.wait_group: until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// ex2.approx.ftz.f32: 2^x; -inf gives 0, NaN stays.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// lg2.approx.ftz.f32: log2(x).
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// rcp.approx.ftz.f32: 1 / x.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

/// st.shared.b32
__device__ __forceinline__ void st_shared(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(shared), "r"(x) : "memory");
}

/// st.shared.v4.b32
__device__ __forceinline__ void st_shared(uint32_t shared, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

/// ld.shared.b32
__device__ __forceinline__ uint32_t ld_shared(uint32_t shared) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(x) : "r"(shared) : "memory");
  return x;
}

/// ld.shared.v4.b32
__device__ __forceinline__ uint4 ld_shared_v4(uint32_t shared) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

/// movmatrix.sync.aligned.m8n8.trans.b16: an 8x8 matrix of 16-bit elements, two neighbours of row lane / 4 a lane,
/// transposed.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

/// prefetch.global.L2
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

/// 16 bytes that are written and read as one.
struct Packet {
  float x, y;
  uint64_t launch;
};

/// st.relaxed.gpu.global.b128
__device__ __forceinline__ void st_relaxed_b128(void* to, float x, float y, uint64_t launch) {
  const uint64_t low = __float_as_uint(x) | static_cast<uint64_t>(__float_as_uint(y)) << 32;
  asm volatile(
      "{\n"
      ".reg .b128 both;\n"
      "mov.b128 both, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], both;\n"
      "}\n" ::"l"(to),
      "l"(low), "l"(launch)
      : "memory");
}

/// ld.relaxed.gpu.global.b128
__device__ __forceinline__ Packet ld_relaxed_b128(const void* from) {
  uint64_t low, launch;
  asm volatile(
      "{\n"
      ".reg .b128 both;\n"
      "ld.relaxed.gpu.global.b128 both, [%2];\n"
      "mov.b128 {%0, %1}, both;\n"
      "}\n"
      : "=l"(low), "=l"(launch)
      : "l"(from)
      : "memory");
  return {__uint_as_float(static_cast<uint32_t>(low)), __uint_as_float(static_cast<uint32_t>(low >> 32)), launch};
}

/// griddepcontrol.wait: until the kernels that this one depends on have completed and their writes are visible. Does nothing
/// in a launch without the attribute, and before sm_90.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// griddepcontrol.launch_dependents: the kernel that depends on this one may start; it waits for this one's end itself.
__device__ __forceinline__ void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// No instruction: x, of which the compiler knows nothing any more, so that what follows from it is computed here, not kept
/// in registers from where it was computed before.
template <typename T>
__device__ __forceinline__ T opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace vivace::ptx
