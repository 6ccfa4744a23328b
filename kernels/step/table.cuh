// Indices into the step's tables, which only the device reads.
#pragma once

#include <cstdint>

namespace vivace {

/// What the step reads for a token, position or request outside its table: the nearest entry.
__device__ __forceinline__ int64_t clamp_index(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

}  // namespace vivace
