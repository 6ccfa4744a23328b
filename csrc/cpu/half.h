// bf16 and fp16 as bits, with scalar conversions. Everything here is inlined always: files compiled for different
// instruction sets include it, and an out-of-line copy of one must never be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#define VIVACE_INLINE inline __attribute__((always_inline))

namespace vivace::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
VIVACE_INLINE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

VIVACE_INLINE float to_float(float x) { return x; }
VIVACE_INLINE float to_float(BFloat16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }
VIVACE_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return bit_copy<float>(sign | 0x7f800000u | magnitude);  // Inf, NaN
  // The exponent moves from bias 15 to bias 127; the multiplication also normalises what is subnormal.
  return bit_copy<float>(sign | bit_copy<uint32_t>(bit_copy<float>(magnitude) * 0x1p112f));
}

template <typename T>
T from_float(float x);

template <>
VIVACE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
VIVACE_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // to nearest, ties to even
}
template <>
VIVACE_INLINE Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to Inf
  if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 round at the unit 2^-24
    const float shifted = bit_copy<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace vivace::cpu
