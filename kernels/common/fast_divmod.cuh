// Division by a number known at launch: a high multiply and a shift instead of the ~20 instructions of an integer division.
#pragma once

#include <cstdint>

namespace vivace {

/// n / divisor and n % divisor for 0 <= n < 2^31 (Granlund and Montgomery, PLDI 1994).
struct FastDivmod {
  uint32_t divisor = 1, magic = 1, shift = 0;

  FastDivmod() = default;
  explicit FastDivmod(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }

  __device__ __forceinline__ void operator()(int n, int& quotient, int& remainder) const {
    const uint32_t u = static_cast<uint32_t>(n);
    const uint32_t q = (__umulhi(u, magic) + u) >> shift;
    quotient = static_cast<int>(q);
    remainder = static_cast<int>(u - q * divisor);
  }
};

}  // namespace vivace
