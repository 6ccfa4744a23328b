// The one struct that an attention call is, from the operator down to the kernel, on CPU and on CUDA.
#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// One attention call. Pointers are memory of the call's device; strides are in elements; the last dimension
/// of q, k, v and out is contiguous. A null pointer means that the feature is off.
///
/// Three layouts share it:
///  - dense: q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_kv, ...);
///  - variable length: q (total_q, heads, head_dim) with cu_seqlens_q, k and v (total_k, heads_kv, ...) with cu_seqlens_k;
///  - cache: k and v are the cache, (cache_rows, capacity, heads_kv, ...) or, with block_table, pages
///    (num_pages, page_size, heads_kv, ...); row b of the batch holds cache_seqlens[b] keys before the call.
///    q is dense or, with cu_seqlens_q, variable length.
/// q row i of a sequence of n_q queries and n_k keys stands at position i + n_k - n_q (bottom-right alignment).
struct AttentionParams {
  DType dtype = DType::kFloat32;  // of q, k, v and out

  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;   // q's layout with head_dim_v in the last dimension; rows that see nothing are 0
  float* lse = nullptr;  // fp32, natural log, of the scaled, softcapped and biased scores, sinks included;
                         // (batch, heads, seqlen_q) or, with cu_seqlens_q, (heads, total_q); -inf where a row sees nothing

  int64_t q_stride[3] = {0, 0, 0};  // batch, row, head; 64 bits: batch * row overflows 32 on a 139 GiB card
  int64_t k_stride[3] = {0, 0, 0};  // batch (or page), row, head
  int64_t v_stride[3] = {0, 0, 0};
  int64_t out_stride[3] = {0, 0, 0};

  int64_t batch = 0;
  int64_t heads = 0;
  int64_t heads_kv = 0;    // divides heads; head h reads kv head h / (heads / heads_kv)
  int64_t head_dim = 0;    // of q and k
  int64_t head_dim_v = 0;  // of v and out
  int64_t seqlen_q = 0;    // dense: exact; variable length: the longest
  int64_t seqlen_k = 0;    // dense: exact; variable length: the longest; cache: the capacity of a row
  int64_t total_q = 0;     // rows of q over the whole batch
  int64_t total_k = 0;     // variable length only

  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1)
  const int32_t* cu_seqlens_k = nullptr;  // (batch + 1)
  const int32_t* seqused_q = nullptr;     // (batch) rows in use, at most what cu_seqlens allots
  const int32_t* seqused_k = nullptr;     // (batch)

  // KV cache
  bool has_cache = false;
  const int32_t* cache_seqlens = nullptr;    // (batch) keys in each row before this call; null: all of capacity
  const int32_t* cache_batch_idx = nullptr;  // (batch) row of the cache that batch entry b uses, with k_new no other's;
                                             // null: b
  const int32_t* cache_leftpad = nullptr;    // (batch) first valid key of each row
  const int32_t* block_table = nullptr;      // (batch, max_pages) page of each page_size keys
  int64_t block_table_stride = 0;            // between rows of block_table
  int64_t page_size = 0;
  const void* k_new = nullptr;  // keys to append, q's layout (dense or cu_seqlens_q), heads_kv heads
  const void* v_new = nullptr;
  int64_t k_new_stride[3] = {0, 0, 0};
  int64_t v_new_stride[3] = {0, 0, 0};
  int64_t seqlen_new = 0;  // dense: exact; with cu_seqlens_q the longest; 0: append nothing

  // Rotary embedding of q and k_new, applied before the append
  const void* rotary_cos = nullptr;  // (max_position, rotary_dim / 2), contiguous, of rotary_dtype
  const void* rotary_sin = nullptr;
  DType rotary_dtype = DType::kFloat32;  // fp32 or dtype
  int64_t rotary_dim = 0;
  int64_t rotary_positions = 0;     // max_position, for bounds
  bool rotary_interleaved = false;  // pairs (2i, 2i + 1), as GPT-J; otherwise (i, i + rotary_dim / 2), as NeoX

  // Scores: s = q . k * softmax_scale, softcapped, + alibi, + bias, then masked
  float softmax_scale = 1.0f;
  float softcap = 0.0f;                   // > 0: cap * tanh(s / cap)
  bool causal = false;                    // window_right is 0 then
  int64_t window_left = -1;               // keys before the diagonal that stay visible; -1: all
  int64_t window_right = -1;              // keys after it; -1: all
  const float* alibi_slopes = nullptr;    // (heads) or (batch, heads): bias -slope * |i + n_k - n_q - j|
  int64_t alibi_batch_stride = 0;         // 0 for (heads)
  const void* bias = nullptr;             // broadcast to (batch, heads, seqlen_q, seqlen_k); bool: false hides the key
  int64_t bias_stride[4] = {0, 0, 0, 0};  // 0 where broadcast
  DType bias_dtype = DType::kFloat32;     // kFloat32, dtype, or kBool
  const float* sinks = nullptr;           // (heads) one more logit in the denominator, without a value

  // Dropout of the probabilities; element (b, h, i, j) is kept as kernels/common/philox.h says
  float dropout_p = 0.0f;
  const int64_t* rng_state = nullptr;  // (2) seed, offset; memory of the call's device

  // Probabilities of one head, for the last probe_rows queries of each sequence
  float* probe = nullptr;  // (batch, probe_rows, probe_capacity), contiguous; keys at or past the length get 0
  int64_t probe_head = -1;
  int64_t probe_rows = 0;
  int64_t probe_capacity = 0;

  // How to run; filled in by csrc
  int64_t num_splits = 1;  // decode: parts that each row's visible keys are cut into; 0: see split_keys
  int64_t split_keys = 0;  // decode with num_splits 0: cut every row at multiples of it, so that a row's bits do not depend
                           // on the batch; 0: cut the whole batch into equal ranges of keys, which is fastest
  int64_t multiprocessors = 0;  // of the device
  int64_t arch = 0;             // decode: 90 for the Hopper kernel, else the sm80 one
  bool dependent = false;       // decode: launch as a programmatic dependent of the kernel before (Hopper and newer)
  void* workspace = nullptr;    // attention_workspace() bytes: rotated q, partial results
  int64_t cache_rows = 0;       // that k and v have, with block_table pages: bounds of what is prefetched
};

}  // namespace vivace
