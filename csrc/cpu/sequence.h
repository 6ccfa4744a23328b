// One sequence of an attention call, with the offsets of its rows and its masks resolved.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/cpu/half.h"
#include "kernels/attention/params.h"

namespace vivace::cpu {

/// Entry `index` of the batch. Offsets are in elements from the tensor's pointer.
struct Sequence {
  int64_t index = 0;
  int64_t queries = 0;     // rows of q in use
  int64_t query_rows = 0;  // rows of q allotted; those past `queries` get out 0 and lse -inf
  int64_t keys = 0;        // keys after the append
  int64_t key_rows = 0;    // rows of k allotted
  int64_t first_key = 0;   // left padding
  int64_t cached = 0;      // keys before the append
  int64_t appended = 0;
  int64_t query_row = 0;  // first row within the batch entry's q, out, dq: cu_seqlens_q
  int64_t key_row = 0;    // likewise of k, v: cu_seqlens_k
  int64_t cache_row = 0;  // index along k's first dimension, when k is not paged
  const int32_t* pages = nullptr;
  float* lse = nullptr;  // of query 0 of head 0
  int64_t lse_head_stride = 0;
};

std::vector<Sequence> resolve_sequences(const AttentionParams& params);

/// Offsets of the keys first ... first + count - 1, head 0, in k and v.
void key_offsets(const AttentionParams& params, const Sequence& sequence, int64_t first, int64_t count, int64_t* k,
                 int64_t* v);

/// bias[b, head, query, first ... first + count - 1] in fp32; a hidden key is -inf.
void load_bias(const AttentionParams& params, int64_t b, int64_t head, int64_t query, int64_t first, int64_t count,
               float* bias);

/// Whether dropout keeps each of the keys first ... first + count - 1: 1 or 0.
void load_dropout(const AttentionParams& params, int64_t b, int64_t head, int64_t query, int64_t first, int64_t count,
                  float* kept);

/// Offset of row `row` of the batch entry's q, out or a gradient of them.
VIVACE_INLINE int64_t row_offset(const Sequence& s, const int64_t (&stride)[3], int64_t row, int64_t head) {
  return s.index * stride[0] + (s.query_row + row) * stride[1] + head * stride[2];
}

/// Keys begin ... end - 1 are visible to `query`; all others are not.
struct KeyRange {
  int64_t begin, end;
};
VIVACE_INLINE KeyRange visible_keys(const AttentionParams& p, const Sequence& s, int64_t query) {
  const int64_t diagonal = query + s.keys - s.queries;
  const int64_t right = p.causal ? 0 : p.window_right;
  KeyRange range{s.first_key, s.keys};
  if (p.window_left >= 0 && diagonal - p.window_left > range.begin) range.begin = diagonal - p.window_left;
  if (right >= 0 && right < s.keys - 1 - diagonal) range.end = diagonal + right + 1;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

}  // namespace vivace::cpu
