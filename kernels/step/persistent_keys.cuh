// What a row of the persistent step finds in the cache, and which CTA reads which of its keys.
#pragma once

#include "kernels/step/persistent_parts.cuh"
#include "kernels/step/table.cuh"

namespace vivace::step {

/// What the cache says of a row.
struct CacheRow {
  int length;   // old keys to read
  int row;      // of the cache
  bool writes;  // whether there is room for the new key
};
__device__ __forceinline__ CacheRow cache_row(const StepParams& p, int length, int c) {
  if (c < 0 || c >= p.cache_rows) return {0, 0, false};
  const int capacity = static_cast<int>(p.capacity);
  return {max(0, min(length, capacity)), c, length >= 0 && length < capacity};
}
__device__ __forceinline__ CacheRow cache_row(const StepParams& p, int row) {
  return cache_row(p, p.cache_seqlens[row], p.cache_batch_idx[row]);
}

/// The old keys of a row that a CTA reads in a layer, [first, end). They are split over as many of a head's CTAs as their
/// number is worth; which ones changes from row to row and from layer to layer, so that all stream as many bytes.
struct KeyRange {
  int first, end;
  int part;   // of the row, which this CTA takes, perhaps an empty one; -1: none
  bool last;  // it is the row's last part, which also takes the new key
};
/// log2 of the number of parts.
template <typename S>
__device__ __forceinline__ int parts_log2(int length) {
  int n = S::batch_log2;
#pragma unroll
  for (int i = S::batch_log2; i < S::group_log2; ++i) n += length > S::few_keys << (i - S::batch_log2);
  return n;
}
template <typename S>
__device__ __forceinline__ KeyRange key_range(int layer, int row, int cta_part, int length) {
  const int n = parts_log2<S>(length), sets = S::group >> n;
  const int spread = (row % 2 * (S::group / 2) + row / 2 * (S::group / 4)) >> n;
  const bool takes = cta_part >> n == ((layer + spread) & (sets - 1));
  const int part = cta_part & ((1 << n) - 1), first = part * length >> n, end = (part + 1) * length >> n;
  return {first, takes ? end : first, takes ? part : -1, takes && part == (1 << n) - 1};
}

}  // namespace vivace::step
