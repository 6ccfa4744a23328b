// Warpgroup matrix products of Hopper: wgmma.mma_async m64nNk16, fp32 accumulators, fp16 or bf16 operands.
// 128 threads issue one; A is in shared memory (SS) or registers (RS), B in shared memory, both described by 64-bit
// descriptors. Accumulator fragment of a thread: d[4 * j + {0, 1}] is row lane / 4 of its warp's 16 rows, columns 8 * j + 2
// * (lane % 4) + {0, 1}; d[4 * j + {2, 3}] the same columns of row lane / 4 + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vivace::sm90 {

/// wgmma.fence: orders this warpgroup's register and shared-memory writes before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// wgmma.commit_group
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// wgmma.wait_group: at most `kPending` groups stay in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving reads or writes of an accumulator across an asynchronous product.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// Descriptor of an operand in 128-byte-swizzled shared memory. K-major (rows of 64 elements along K): stride 1024 between
/// groups of 8 rows, leading unused. MN-major (rows along K, 64 elements of M or N each): leading = bytes between 64-element
/// columns of rows, stride 1024 between groups of 8 rows.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem_address, uint32_t leading_bytes) {
  return static_cast<uint64_t>((smem_address & 0x3ffff) >> 4) |
         (static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16) | (static_cast<uint64_t>(1024 >> 4) << 32) |
         (uint64_t{1} << 62);
}

/// The same in two halves: the descriptors of one operand differ in the address alone, which is added to the low half in
/// units of 16 bytes.
__device__ __forceinline__ uint32_t wgmma_descriptor_low(const void* shared, uint32_t leading_bytes) {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) >> 4) | (leading_bytes >> 4) << 16;
}
__device__ __forceinline__ uint64_t wgmma_descriptor_of(uint32_t low) {
  return static_cast<uint64_t>(low) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

/// The products of one shape, m64 n `kN` k16, on elements `T`; the accumulator is float[kN / 2] a thread.
///   ss: d = A B + (accumulate ? d : 0); A and B K-major in shared memory
///   rs: d = A B + (accumulate ? d : 0); A in registers, B MN-major in shared memory
///   rs_k: the same, B K-major
template <typename T, int kN>
struct Wgmma;

// PTX takes every accumulator register by its number: VIVACE_REGISTERS_r is the text "%0, ... %(r - 1)", VIVACE_OUTPUTS_r
// the r operands of it; both are chains of eights, and a four.
#define VIVACE_OUTPUTS_OF_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define VIVACE_OUTPUTS_OF_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VIVACE_REGISTERS_4 "%0, %1, %2, %3"
#define VIVACE_OUTPUTS_4 VIVACE_OUTPUTS_OF_4(0)
#define VIVACE_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VIVACE_OUTPUTS_8 VIVACE_OUTPUTS_OF_8(0)
#define VIVACE_REGISTERS_12 VIVACE_REGISTERS_8 ", %8, %9, %10, %11"
#define VIVACE_OUTPUTS_12 VIVACE_OUTPUTS_8, VIVACE_OUTPUTS_OF_4(8)
#define VIVACE_REGISTERS_16 VIVACE_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VIVACE_OUTPUTS_16 VIVACE_OUTPUTS_8, VIVACE_OUTPUTS_OF_8(8)
#define VIVACE_REGISTERS_24 VIVACE_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define VIVACE_OUTPUTS_24 VIVACE_OUTPUTS_16, VIVACE_OUTPUTS_OF_8(16)
#define VIVACE_REGISTERS_32 VIVACE_REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VIVACE_OUTPUTS_32 VIVACE_OUTPUTS_24, VIVACE_OUTPUTS_OF_8(24)
#define VIVACE_REGISTERS_40 VIVACE_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VIVACE_OUTPUTS_40 VIVACE_OUTPUTS_32, VIVACE_OUTPUTS_OF_8(32)
#define VIVACE_REGISTERS_48 VIVACE_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VIVACE_OUTPUTS_48 VIVACE_OUTPUTS_40, VIVACE_OUTPUTS_OF_8(40)
#define VIVACE_REGISTERS_56 VIVACE_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define VIVACE_OUTPUTS_56 VIVACE_OUTPUTS_48, VIVACE_OUTPUTS_OF_8(48)
#define VIVACE_REGISTERS_64 VIVACE_REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define VIVACE_OUTPUTS_64 VIVACE_OUTPUTS_56, VIVACE_OUTPUTS_OF_8(56)
#define VIVACE_REGISTERS_72 VIVACE_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VIVACE_OUTPUTS_72 VIVACE_OUTPUTS_64, VIVACE_OUTPUTS_OF_8(64)
#define VIVACE_REGISTERS_80 VIVACE_REGISTERS_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define VIVACE_OUTPUTS_80 VIVACE_OUTPUTS_72, VIVACE_OUTPUTS_OF_8(72)
#define VIVACE_REGISTERS_88 VIVACE_REGISTERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define VIVACE_OUTPUTS_88 VIVACE_OUTPUTS_80, VIVACE_OUTPUTS_OF_8(80)
#define VIVACE_REGISTERS_96 VIVACE_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define VIVACE_OUTPUTS_96 VIVACE_OUTPUTS_88, VIVACE_OUTPUTS_OF_8(88)
#define VIVACE_REGISTERS_104 VIVACE_REGISTERS_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define VIVACE_OUTPUTS_104 VIVACE_OUTPUTS_96, VIVACE_OUTPUTS_OF_8(96)
#define VIVACE_REGISTERS_112 VIVACE_REGISTERS_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define VIVACE_OUTPUTS_112 VIVACE_OUTPUTS_104, VIVACE_OUTPUTS_OF_8(104)
#define VIVACE_REGISTERS_120 VIVACE_REGISTERS_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define VIVACE_OUTPUTS_120 VIVACE_OUTPUTS_112, VIVACE_OUTPUTS_OF_8(112)
#define VIVACE_REGISTERS_128 VIVACE_REGISTERS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define VIVACE_OUTPUTS_128 VIVACE_OUTPUTS_120, VIVACE_OUTPUTS_OF_8(120)

// Wgmma<T, n>'s functions with A in registers: B transposed (its columns contiguous), or not. Arguments as below.
#define VIVACE_WGMMA_RS(name, transposed, type, n, r, a0, a1, a2, a3, a4, a5)                                            \
  static __device__ __forceinline__ void name(float(&d)[r], const uint32_t(&a)[4], uint64_t b, bool accumulate) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " a5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type     \
                 "." type " {" VIVACE_REGISTERS_##r "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " a4 ", p, 1, 1, " #transposed \
                                                    ";\n}\n"                                                             \
                 : VIVACE_OUTPUTS_##r                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));               \
  }
// n columns in r = n / 2 registers; a0 to a5: "%r" to "%(r + 5)", the operands after them.
#define VIVACE_WGMMA(T, type, n, r, a0, a1, a2, a3, a4, a5)                                                            \
  template <>                                                                                                          \
  struct Wgmma<T, n> {                                                                                                 \
    static __device__ __forceinline__ void ss(float (&d)[r], uint64_t a, uint64_t b, bool accumulate) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " a2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
                   "." type " {" VIVACE_REGISTERS_##r "}, " a0 ", " a1 ", p, 1, 1, 0, 0;\n}\n"                         \
                   : VIVACE_OUTPUTS_##r                                                                                \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                               \
    }                                                                                                                  \
    VIVACE_WGMMA_RS(rs, 1, type, n, r, a0, a1, a2, a3, a4, a5)                                                         \
    VIVACE_WGMMA_RS(rs_k, 0, type, n, r, a0, a1, a2, a3, a4, a5)                                                       \
  };
#define VIVACE_WGMMA_TYPES(...)                    \
  VIVACE_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) \
  VIVACE_WGMMA(__half, "f16", __VA_ARGS__)

VIVACE_WGMMA_TYPES(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
VIVACE_WGMMA_TYPES(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
VIVACE_WGMMA_TYPES(24, 12, "%12", "%13", "%14", "%15", "%16", "%17")
VIVACE_WGMMA_TYPES(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
VIVACE_WGMMA_TYPES(48, 24, "%24", "%25", "%26", "%27", "%28", "%29")
VIVACE_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
VIVACE_WGMMA_TYPES(80, 40, "%40", "%41", "%42", "%43", "%44", "%45")
VIVACE_WGMMA_TYPES(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
VIVACE_WGMMA_TYPES(112, 56, "%56", "%57", "%58", "%59", "%60", "%61")
VIVACE_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
VIVACE_WGMMA_TYPES(160, 80, "%80", "%81", "%82", "%83", "%84", "%85")
VIVACE_WGMMA_TYPES(176, 88, "%88", "%89", "%90", "%91", "%92", "%93")
VIVACE_WGMMA_TYPES(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
VIVACE_WGMMA_TYPES(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

#undef VIVACE_WGMMA_TYPES
#undef VIVACE_WGMMA

}  // namespace vivace::sm90
