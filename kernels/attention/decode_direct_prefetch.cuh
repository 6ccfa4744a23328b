// What decode_direct asks L2 to fetch before it may, or can, load it: memory
// has something to do while a kernel ends, or a CTA.
#pragma once

#include <cstdint>

#include "kernels/attention/decode_direct_args.cuh"
#include "kernels/common/ptx.cuh"

namespace vivace {

/// The first tile of this warp in CTA (head_kv, part, batch) on its way to L2.
/// Lengths, rows and pages may be those of before the kernel that this one
/// depends on: they say what is likely, and are kept within the cache.
template <int kDim, int kKeys, bool kPaged>
__device__ __forceinline__ void prefetch_tile(const DirectArgs& args, int head_kv, int part, int batch) {
  constexpr int kLines = kDim / 64;  // of 128 bytes, of a key
  static_assert(kKeys * kLines == 32);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  const int length = args.lengths != nullptr ? __ldcg(args.lengths + batch) + args.appended : args.capacity;
  const int begin = part * args.first, at = begin + warp * kKeys + lane / kLines;
  if (at >= min(min(length, args.capacity), begin + args.span)) return;
  int row = batch, key = at;
  if constexpr (kPaged) {
    row = __ldcg(args.pages + batch * args.pages_stride + (at >> args.page_shift));
    key = at & ((1 << args.page_shift) - 1);
  } else if (args.rows_of != nullptr) {
    row = __ldcg(args.rows_of + batch);
  }
  row = min(max(row, 0), args.last_row);
  const int line = lane % kLines * 128;
  ptx::prefetch_l2(stepped(stepped(stepped(args.k, head_kv, args.k_head), row, args.k_row), key, args.k_key) + line);
  ptx::prefetch_l2(stepped(stepped(stepped(args.v, head_kv, args.v_head), row, args.v_row), key, args.v_key) + line);
}

/// The same for the CTA that takes this one's place, if the hardware gives out
/// places in turn.
template <int kDim, int kKeys, bool kPaged>
__device__ __forceinline__ void prefetch_next(const DirectArgs& args) {
  int head_kv = static_cast<int>(blockIdx.x) + args.next_head, part = static_cast<int>(blockIdx.y) + args.next_part,
      batch = static_cast<int>(blockIdx.z) + args.next_batch;
  if (head_kv >= static_cast<int>(gridDim.x)) {
    head_kv -= static_cast<int>(gridDim.x);
    ++part;
  }
  if (part >= static_cast<int>(gridDim.y)) {
    part -= static_cast<int>(gridDim.y);
    ++batch;
  }
  if (batch < static_cast<int>(gridDim.z)) prefetch_tile<kDim, kKeys, kPaged>(args, head_kv, part, batch);
}

}  // namespace vivace
