// Vectors of kLanes floats over the compiler's vector extension. Included by the kernels_*.cpp files only, each of which
// names its instruction set in VIVACE_ISA: every function lies in an unnamed namespace, so that no code compiled for one
// instruction set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "csrc/cpu/half.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = __builtin_inff();

VIVACE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
VIVACE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

VIVACE_INLINE Vec broadcast(float x) { return x - Vec{}; }
VIVACE_INLINE VecI broadcast_int(int32_t x) { return x - VecI{}; }

template <int... I>
VIVACE_INLINE VecI iota_of(std::integer_sequence<int, I...>) {
  return VecI{I...};
}
VIVACE_INLINE VecI iota() { return iota_of(std::make_integer_sequence<int, kLanes>()); }

// ---- loads and stores of kLanes elements, or of the first n ----

VIVACE_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
VIVACE_INLINE Vec load(const BFloat16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<Vec>(__builtin_convertvector(h, VecU) << 16);
}
VIVACE_INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  const VecU bits = __builtin_convertvector(h, VecU);
  const VecU sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  const VecU finite = reinterpret_cast<VecU>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
  const VecU special = magnitude | 0x7f800000u;
  return reinterpret_cast<Vec>(sign | (magnitude >= (0x7c00u << 13) ? special : finite));
#endif
}

VIVACE_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
VIVACE_INLINE void store(BFloat16* p, Vec v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU nan = (bits >> 16) | 0x40u;
  const VecH h = __builtin_convertvector(v == v ? rounded : nan, VecH);
  std::memcpy(p, &h, sizeof(h));
}
VIVACE_INLINE void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

template <typename T>
VIVACE_INLINE Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T padded[kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}
template <typename T>
VIVACE_INLINE void store_first(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

// ---- arithmetic ----

VIVACE_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
VIVACE_INLINE Vec absolute(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<VecU>(a) & 0x7fffffffu); }

/// v with lane i holding lane i ^ kDistance.
template <int kDistance, int... I>
VIVACE_INLINE Vec exchange(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ kDistance)...);
}
template <int kDistance>
VIVACE_INLINE Vec exchange(Vec v) {
  return exchange<kDistance>(v, std::make_integer_sequence<int, kLanes>());
}

VIVACE_INLINE float sum_of(Vec v) {
  if constexpr (kLanes > 8) v += exchange<8>(v);
  if constexpr (kLanes > 4) v += exchange<4>(v);
  v += exchange<2>(v);
  v += exchange<1>(v);
  return v[0];
}
VIVACE_INLINE float max_of(Vec v) {
  if constexpr (kLanes > 8) v = maximum(v, exchange<8>(v));
  if constexpr (kLanes > 4) v = maximum(v, exchange<4>(v));
  v = maximum(v, exchange<2>(v));
  v = maximum(v, exchange<1>(v));
  return v[0];
}

/// Swaps blocks of kBlock lanes between two rows: the step of a transposition, and of sums over lanes.
template <int kBlock, int... I>
VIVACE_INLINE Vec low_blocks(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & kBlock) == 0 ? I : kLanes + I - kBlock)...);
}
template <int kBlock, int... I>
VIVACE_INLINE Vec high_blocks(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & kBlock) == 0 ? I + kBlock : kLanes + I)...);
}

template <int kBlock>
VIVACE_INLINE void transpose_step(Vec (&v)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if ((i & kBlock) != 0) continue;
    const Vec a = v[i], b = v[i + kBlock];
    v[i] = low_blocks<kBlock>(a, b, lanes);
    v[i + kBlock] = high_blocks<kBlock>(a, b, lanes);
  }
}
VIVACE_INLINE void transpose(Vec (&v)[kLanes]) {
  transpose_step<1>(v);
  transpose_step<2>(v);
  if constexpr (kLanes > 4) transpose_step<4>(v);
  if constexpr (kLanes > 8) transpose_step<8>(v);
}

/// The sums over the lanes of four vectors.
VIVACE_INLINE void sum_four(Vec a, Vec b, Vec c, Vec d, float* sums) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  constexpr int kHalf = kLanes / 2, kQuarter = kLanes / 4;
  const Vec ab = low_blocks<kHalf>(a, b, lanes) + high_blocks<kHalf>(a, b, lanes);  // halves: a, b
  const Vec cd = low_blocks<kHalf>(c, d, lanes) + high_blocks<kHalf>(c, d, lanes);
  Vec acbd = low_blocks<kQuarter>(ab, cd, lanes) + high_blocks<kQuarter>(ab, cd, lanes);  // quarters: a, c, b, d
  if constexpr (kQuarter > 2) acbd += exchange<2>(acbd);
  if constexpr (kQuarter > 1) acbd += exchange<1>(acbd);
  sums[0] = acbd[0];
  sums[1] = acbd[2 * kQuarter];
  sums[2] = acbd[kQuarter];
  sums[3] = acbd[3 * kQuarter];
}

/// e^x within 1 unit in the last place; 0 below -87.3, Inf above 88.7, NaN stays NaN.
VIVACE_INLINE Vec exp(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x * 1.44269504088896341f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;  // |r| <= ln 2 / 2
  // (e^r - 1 - r) / r^2 at the Chebyshev points of the interval
  Vec p = broadcast(1.98910799e-4f);
  p = p * r + 1.39337312e-3f;
  p = p * r + 8.33331048e-3f;
  p = p * r + 4.16664630e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  // 2^n in two factors, since n reaches 128
  const VecI power = reinterpret_cast<VecI>(shifted) - 0x4b400000;
  const VecI half = power >> 1;
  Vec y = p * reinterpret_cast<Vec>((half + 127) << 23) * reinterpret_cast<Vec>((power - half + 127) << 23);
  y = x < -87.3365448f ? Vec{} : y;
  y = x > 88.7228394f ? broadcast(kInfinity) : y;
  return x == x ? y : x;
}

/// tanh within a few units in the last place: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
VIVACE_INLINE Vec tanh(Vec x) {
  const Vec a = absolute(x), z = x * x;
  // (tanh(x) / x - 1) / x^2 in x^2, at the Chebyshev points of [0, 0.625^2]
  Vec p = broadcast(-6.09671418e-3f);
  p = p * z + 2.09971797e-2f;
  p = p * z - 5.38509078e-2f;
  p = p * z + 1.33327693e-1f;
  p = p * z - 3.33333284e-1f;
  const Vec near = p * z * x + x;
  const Vec tail = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const Vec far = reinterpret_cast<Vec>(reinterpret_cast<VecU>(tail) | (reinterpret_cast<VecU>(x) & 0x80000000u));
  return a < 0.625f ? near : far;
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
