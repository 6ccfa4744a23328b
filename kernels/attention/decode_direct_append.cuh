// Appends in decode_direct: the warp whose tile a new key falls into writes it,
// so that nobody waits for anybody.
#pragma once

#include <cstdint>

#include "kernels/attention/decode_direct_args.cuh"

namespace vivace {

/// Writes those of the new keys and values at [length, length + appended) that
/// fall into tiles of this warp and exist within the capacity. `begin` is where
/// this CTA's part begins, `key` where the warp's first tile does;
/// `place(at, row, within)` sets the row or page, and the row within it, of key
/// `at`. Returns whether one fell into the first tile. To be called by whole
/// warps.
template <int kDim, int kKeys, typename Place>
__device__ __forceinline__ bool append_keys(const DirectArgs& args, int head_kv, int begin, int key, int batch, int length,
                                            const Place& place) {
  constexpr int kChunks = kDim / 8;  // of 16 bytes, of a key
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  bool in_first = false;
#pragma unroll 1
  for (int t = 0; t < args.appended; ++t) {
    const int at = length + t;
    if (at < begin || at >= min(begin + args.span, args.capacity)) continue;
    if ((at - begin) % args.step / kKeys != warp) continue;
    in_first = in_first || at < key + kKeys;
    const char* from =
        stepped(stepped(stepped(args.k_new, batch, args.k_new_batch), t, args.k_new_row), head_kv, args.k_new_head);
    int row, within;
    place(at, row, within);
    const char* to = stepped(stepped(stepped(args.k, row, args.k_row), within, args.k_key), head_kv, args.k_head);
    if (lane >= kChunks) {
      from = stepped(stepped(stepped(args.v_new, batch, args.v_new_batch), t, args.v_new_row), head_kv, args.v_new_head);
      to = stepped(stepped(stepped(args.v, row, args.v_row), within, args.v_key), head_kv, args.v_head);
    }
    const int chunk = 16 * (lane % kChunks);
    if (lane < 2 * kChunks) {
      *reinterpret_cast<uint4*>(const_cast<char*>(to) + chunk) = *reinterpret_cast<const uint4*>(from + chunk);
    }
  }
  __syncwarp();
  return in_first;
}

}  // namespace vivace
