// Where the queries and keys of one batch entry lie: the three layouts of AttentionParams resolved to offsets and lengths.
#pragma once

#include <cstdint>

#include "kernels/attention/params.h"
#include "kernels/common/fast_divmod.cuh"

namespace vivace {

/// One batch entry. Offsets are in elements, to row 0 of the entry, head 0.
struct Sequence {
  int batch;
  int q_rows;     // rows of q and out that the entry is allotted; those at or past `queries` see nothing
  int queries;    // n_q
  int keys;       // n_k: row i stands at position i + n_k - n_q
  int key_begin;  // keys [key_begin, key_end) exist in memory: after the left padding, within the capacity
  int key_end;
  int64_t q_offset, k_offset, v_offset, out_offset;
  int64_t lse_offset, lse_head_stride;
  const int32_t* pages;  // of this entry, or null

  Sequence() = default;
  __device__ __forceinline__ Sequence(const AttentionParams& p, int b) : batch(b) {
    if (p.cu_seqlens_q != nullptr) {
      const int64_t start = p.cu_seqlens_q[b];
      q_rows = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
      q_offset = start * p.q_stride[1];
      out_offset = start * p.out_stride[1];
      lse_offset = start;
      lse_head_stride = p.total_q;
    } else {
      q_rows = static_cast<int>(p.seqlen_q);
      q_offset = b * p.q_stride[0];
      out_offset = b * p.out_stride[0];
      lse_offset = b * p.heads * p.seqlen_q;
      lse_head_stride = p.seqlen_q;
    }
    queries = p.seqused_q != nullptr ? min(p.seqused_q[b], q_rows) : q_rows;

    key_begin = 0;
    pages = nullptr;
    k_offset = 0;
    v_offset = 0;
    if (p.has_cache) {
      const int appended = p.k_new == nullptr ? 0 : p.cu_seqlens_q != nullptr ? q_rows : static_cast<int>(p.seqlen_new);
      keys = (p.cache_seqlens != nullptr ? p.cache_seqlens[b] : static_cast<int>(p.seqlen_k)) + appended;
      key_end = min(keys, static_cast<int>(p.seqlen_k));
      if (p.cache_leftpad != nullptr) key_begin = max(p.cache_leftpad[b], 0);
    } else {
      if (p.seqused_k != nullptr) {
        keys = p.seqused_k[b];
      } else if (p.cu_seqlens_k != nullptr) {
        keys = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
      } else {
        keys = static_cast<int>(p.seqlen_k);
      }
      key_end = keys;
    }
    if (p.block_table != nullptr) {
      pages = p.block_table + b * p.block_table_stride;
    } else if (p.cu_seqlens_k != nullptr) {
      k_offset = p.cu_seqlens_k[b] * p.k_stride[1];
      v_offset = p.cu_seqlens_k[b] * p.v_stride[1];
    } else {
      int64_t row = p.cache_batch_idx != nullptr ? p.cache_batch_idx[b] : b;
      if (row < 0) {  // an entry that only fills the batch: sees nothing
        row = 0;
        keys = key_end = 0;
      }
      k_offset = row * p.k_stride[0];
      v_offset = row * p.v_stride[0];
    }
  }
};

/// Row r of one head of q, k or v: contiguous rows, or, with `pages`, rows scattered in pages.
template <typename T>
struct RowSource {
  const T* base;
  int64_t row_stride;
  const int32_t* pages = nullptr;
  int64_t page_stride = 0;
  FastDivmod page_size{};

  __device__ __forceinline__ const T* row(int r) const {
    if (pages == nullptr) return base + r * row_stride;
    int page, slot;
    page_size(r, page, slot);
    return base + pages[page] * page_stride + slot * row_stride;
  }
};

/// q as the kernel reads it: the rotated copy in the workspace when rotary is on.
inline void use_rotated_q(AttentionParams& p) {
  if (p.rotary_cos == nullptr) return;
  p.q = p.workspace;  // AttentionWorkspace::q_rotated is 0
  p.q_stride[0] = p.seqlen_q * p.heads * p.head_dim;
  p.q_stride[1] = p.heads * p.head_dim;
  p.q_stride[2] = p.head_dim;
}

}  // namespace vivace
