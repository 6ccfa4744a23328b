// What decode_direct's kernel is given.
#pragma once

#include <cstdint>

#include "kernels/common/fast_divmod.cuh"

namespace vivace {

/// Strides in bytes. In the order in which they are needed.
struct DirectArgs {
  const int32_t* lengths;  // (batch) or null: capacity
  const int32_t* rows_of;  // cache_batch_idx or null
  const char *k, *v;
  uint32_t k_row, k_key, k_head;  // row of the cache, or page
  uint32_t v_row, v_key, v_head;
  int capacity, appended;  // keys that a row has room for; new ones, which `lengths` does not count
  int first, step, span;   // part p takes keys p * first + i * step + [0, tile),
                           // below p * first + span
  int rows;                // query rows: seqlen_q * group
  const int32_t* pages;    // block_table
  int64_t pages_stride;
  int page_shift, last_page;
  int early;                             // batch entries whose CTAs may start before they may read
  int last_row;                          // of the cache, or the last page
  int next_head, next_part, next_batch;  // from a CTA to the one that takes its place
  bool prefetch_next;
  const char* q;
  uint32_t q_batch, q_row, q_head;
  float scale;  // of the scores, times log2(e)
  FastDivmod by_group;
  char* out;
  uint32_t out_batch, out_row, out_head;
  int heads, seqlen_q;
  float* lse;
  char* packets;
  uint64_t launch;            // number of this launch, see decode_merge.cuh
  const char *k_new, *v_new;  // (batch, appended, heads_kv, head_dim), to be appended here; null: they are there
  uint32_t k_new_batch, k_new_row, k_new_head;
  uint32_t v_new_batch, v_new_row, v_new_head;
};

/// offset + i * stride, as one instruction.
template <typename T>
__device__ __forceinline__ T* stepped(T* base, int i, uint32_t stride) {
  return base + static_cast<uint64_t>(static_cast<uint32_t>(i)) * stride;
}

}  // namespace vivace
