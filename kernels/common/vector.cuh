// 16-byte accesses of 16- and 32-bit elements, as fp32 or as bits; and what launchers share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "kernels/common/convert.cuh"

namespace vivace {

/// Elements of T in 16 bytes.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

/// The kVector<T> elements that 16 bytes hold.
template <typename T>
__device__ __forceinline__ void unpack_vector(const uint4& bits, float (&x)[kVector<T>]) {
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else {
      const float2 pair = unpack2<T>(word[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

/// kN consecutive elements as fp32; from 16-byte aligned memory, or one by one where kN is 1.
template <int kN, typename T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[kN]) {
  if constexpr (kN == 1) {
    x[0] = to_float(*p);
  } else {
    static_assert(kN % kVector<T> == 0);
#pragma unroll
    for (int i = 0; i < kN; i += kVector<T>) {
      float part[kVector<T>];
      unpack_vector<T>(*reinterpret_cast<const uint4*>(p + i), part);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) x[i + j] = part[j];
    }
  }
}

/// The converse, rounded to nearest even.
template <int kN, typename T>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[kN]) {
  if constexpr (kN == 1) {
    *p = from_float<T>(x[0]);
  } else if constexpr (sizeof(T) == 4) {
    static_assert(kN % 4 == 0);
#pragma unroll
    for (int i = 0; i < kN; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else {
    static_assert(kN % 8 == 0);
#pragma unroll
    for (int i = 0; i < kN; i += 8) {
      *reinterpret_cast<uint4*>(p + i) = make_uint4(pack2<T>(x[i], x[i + 1]), pack2<T>(x[i + 2], x[i + 3]),
                                                    pack2<T>(x[i + 4], x[i + 5]), pack2<T>(x[i + 6], x[i + 7]));
    }
  }
}

/// kN elements, bit for bit.
template <int kN, typename T>
__device__ __forceinline__ void copy_vector(T* to, const T* from) {
  if constexpr (kN == 1) {
    *to = *from;
  } else {
    static_assert(kN == kVector<T>);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

// ---- Host side of the launchers ----

inline bool is_aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Whether every stride, in elements of `size` bytes, keeps 16-byte alignment.
inline bool are_aligned_16(std::initializer_list<int64_t> strides, int64_t size) {
  for (const int64_t stride : strides) {
    if (stride * size % 16 != 0) return false;
  }
  return true;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// gridDim.x or y for `blocks` of work; kernels that may meet more loop over blockIdx + n * gridDim.
inline unsigned grid_x(int64_t blocks) { return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff); }

inline unsigned grid_y(int64_t blocks) { return static_cast<unsigned>(blocks < 65535 ? blocks : 65535); }

template <typename T>
struct TypeTag {
  using type = T;
};

/// body(TypeTag<T>{}) for the floating-point type that `dtype` is.
template <typename Body>
cudaError_t for_float_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(TypeTag<float>{});
    case DType::kFloat16: return body(TypeTag<__half>{});
    case DType::kBFloat16: return body(TypeTag<__nv_bfloat16>{});
    default: return cudaErrorNotSupported;
  }
}

}  // namespace vivace
