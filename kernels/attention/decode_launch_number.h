// What tells the packets of one launch from those of all others, see decode_merge.cuh.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace vivace {

/// A number that no launch had before, not 0. Scattered over 64 bits, so that memory never holds it by chance.
inline uint64_t decode_launch_number() {
  static std::atomic<uint64_t> count{
      static_cast<uint64_t>(std::chrono::high_resolution_clock::now().time_since_epoch().count())};
  uint64_t x = count.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15ull;  // SplitMix64: one to one
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  x ^= x >> 31;
  return x == 0 ? 1 : x;
}

}  // namespace vivace
