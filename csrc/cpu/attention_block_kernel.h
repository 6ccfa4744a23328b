// Many queries against all of their keys: FlashAttention-2's loop (arXiv 2307.08691), a block of keys at a time.
#pragma once

#include "csrc/cpu/gemm.h"
#include "csrc/cpu/score_kernel.h"
#include "csrc/cpu/softmax_end.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

/// out += probabilities (count) values (count, width); a probability of 0 keeps what is not finite in its value out.
VIVACE_INLINE void add_finite(int64_t count, const float* probabilities, const float* values, int64_t width, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    if (probabilities[j] == 0.0f) continue;
    for (int64_t d = 0; d < width; d += kLanes) {
      store(out + d, load(out + d) + load(values + j * width + d) * probabilities[j]);
    }
  }
}

template <typename T>
void attention_block(const AttentionBlock& task) {
  const AttentionParams& p = *task.params;
  const Sequence& s = *task.sequence;
  const int64_t group = p.heads / p.heads_kv;
  const int64_t rows = task.row_end - task.row_begin;
  const int64_t width = p.head_dim, value_width = padded(p.head_dim_v);
  float* q = task.scratch;                      // (rows, width), times softmax_scale
  float* out = q + rows * width;                // (rows, value_width)
  float* largest = out + rows * value_width;    // (rows)
  float* sum = largest + rows;                  // (rows)
  float* k = sum + rows;                        // (width, kKeyBlock)
  float* v = k + width * kKeyBlock;             // (kKeyBlock, value_width)
  float* scores = v + kKeyBlock * value_width;  // (kTileRows, kKeyBlock)
  int64_t k_offsets[kKeyBlock], v_offsets[kKeyBlock];

  const T* q_base = static_cast<const T*>(p.q);
  for (int64_t r = 0; r < rows; ++r) {
    const ScoreRow row = score_row(p, s, task.kv_head, task.row_begin + r);
    const T* from = q_base + row_offset(s, p.q_stride, row.query, row.head);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(q + r * width + d, load(from + d) * p.softmax_scale);
    for (; d < width; ++d) q[r * width + d] = to_float(from[d]) * p.softmax_scale;
    for (d = 0; d < value_width; d += kLanes) store(out + r * value_width + d, Vec{});
    largest[r] = -kInfinity;
    sum[r] = 0.0f;
  }

  // Rows are in the order of their queries, so the ranges of visible keys only move on.
  const int64_t key_begin = visible_keys(p, s, task.row_begin / group).begin;
  const int64_t key_end = visible_keys(p, s, (task.row_end - 1) / group).end;
  for (int64_t first = key_begin / kKeyBlock * kKeyBlock; first < key_end; first += kKeyBlock) {
    const int64_t keys = min64(kKeyBlock, key_end - first);
    key_offsets(p, s, first, keys, k_offsets, v_offsets);
    pack_transposed(static_cast<const T*>(p.k) + task.kv_head * p.k_stride[2], k_offsets, keys, width, k, kKeyBlock);
    const bool finite =
        pack_rows(static_cast<const T*>(p.v) + task.kv_head * p.v_stride[2], v_offsets, keys, p.head_dim_v, value_width, v);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t tile = min64(kTileRows, rows - r);
      const int64_t tile_begin = visible_keys(p, s, (task.row_begin + r) / group).begin;
      const int64_t tile_end = visible_keys(p, s, (task.row_begin + r + tile - 1) / group).end;
      const int64_t count = min64(keys, tile_end - first);
      if (count <= 0 || tile_begin >= first + keys) continue;

      gemm<false>(tile, count, width, q + r * width, width, 1, k, kKeyBlock, scores, kKeyBlock);  // S = Q K^T
      for (int64_t i = 0; i < tile; ++i) {
        const ScoreRow row = score_row(p, s, task.kv_head, task.row_begin + r + i);
        float* probabilities = scores + i * kKeyBlock;
        finish_scores(p, s, row, first, count, probabilities);
        const float factor = online_softmax(count, probabilities, largest[r + i], sum[r + i]);
        float* o = out + (r + i) * value_width;
        if (factor != 1.0f) {
          for (int64_t d = 0; d < value_width; d += kLanes) store(o + d, load(o + d) * factor);
        }
        if (p.dropout_p > 0.0f) drop(p, s, row, first, count, probabilities);
        if (!finite) add_finite(count, probabilities, v, value_width, o);
      }
      if (finite) {  // O += P V
        gemm<true>(tile, value_width, count, scores, kKeyBlock, 1, v, value_width, out + r * value_width, value_width);
      }
    }
  }

  T* out_base = static_cast<T*>(p.out);
  for (int64_t r = 0; r < rows; ++r) {
    const ScoreRow row = score_row(p, s, task.kv_head, task.row_begin + r);
    const SoftmaxEnd end = softmax_end(p, row.head, largest[r], sum[r]);
    // end.scale is 0 for a row that saw nothing; then its values are 0 too
    store_scaled(out + r * value_width, p.head_dim_v, end.scale,
                 out_base + row_offset(s, p.out_stride, row.query, row.head));
    if (s.lse != nullptr) s.lse[row.head * s.lse_head_stride + row.query] = end.lse;
  }
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
