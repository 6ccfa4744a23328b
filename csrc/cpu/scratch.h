// Memory of a thread that operators reuse from call to call, so that a short call pays for no allocation.
#pragma once

#include <cstdint>
#include <vector>

namespace vivace::cpu {

/// `count` floats, aligned to 64 bytes and not initialised, valid until the thread's next call.
inline float* thread_scratch(int64_t count) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < count + 16) {
    memory.clear();  // nothing to copy
    memory.resize(static_cast<size_t>(count + 16));
  }
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

}  // namespace vivace::cpu
