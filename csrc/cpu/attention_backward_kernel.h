// Gradients of attention, a block of keys at a time: probabilities are recomputed from lse (FlashAttention-2,
// arXiv 2307.08691, algorithm 2).
#pragma once

#include "csrc/cpu/gemm.h"
#include "csrc/cpu/score_kernel.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

/// One row of a tile: `scores` holds q . k and becomes dropped probabilities; `gradients` holds dout . v and becomes dS.
VIVACE_INLINE void score_gradients(const AttentionParams& p, const Sequence& s, const ScoreRow& row, int64_t first,
                                   int64_t count, float lse, float delta, float* scores, float* gradients) {
  float slope[kKeyBlock];  // of softcap: 1 - tanh^2
  if (p.softcap > 0.0f) {
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec capped = tanh(load(scores + j) * (1.0f / p.softcap));
      store(slope + j, 1.0f - capped * capped);
    }
  }
  float kept[kKeyBlock];
  if (p.dropout_p > 0.0f) load_dropout(p, s.index, row.head, row.query, first, count, kept);
  const float survivors = p.dropout_p > 0.0f ? 1.0f / (1.0f - p.dropout_p) : 1.0f;
  finish_scores(p, s, row, first, count, scores);
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec probability = lse == -kInfinity ? Vec{} : exp(load(scores + j) - lse);
    Vec gradient = load(gradients + j), dropped = probability;
    if (p.dropout_p > 0.0f) {
      const Vec factor = load(kept + j) * survivors;
      dropped = load(kept + j) != 0.0f ? probability * factor : Vec{};
      gradient = load(kept + j) != 0.0f ? gradient * factor : Vec{};
    }
    gradient = probability * (gradient - delta);
    if (p.softcap > 0.0f) gradient *= load(slope + j);
    store(gradients + j, probability == 0.0f ? Vec{} : gradient);
    store(scores + j, dropped);
  }
}

template <typename T>
void attention_backward_head(const AttentionBackwardHead& task) {
  const AttentionBackwardParams& g = *task.params;
  const AttentionParams& p = g.forward;
  const Sequence& s = *task.sequence;
  const int64_t rows = s.queries * (p.heads / p.heads_kv);
  const int64_t width = padded(p.head_dim), value_width = padded(p.head_dim_v);
  float* q = task.scratch;                                      // (rows, width), times softmax_scale
  float* dq = q + rows * width;                                 // (rows, width)
  float* dout = dq + rows * width;                              // (rows, value_width)
  float* lse = dout + rows * value_width;                       // (rows)
  float* delta = lse + rows;                                    // (rows) dout . out
  float* scores = delta + rows;                                 // (kBackwardRows, kKeyBlock)
  float* gradients = scores + kBackwardRows * kKeyBlock;        // (kBackwardRows, kKeyBlock)
  float* k_transposed = gradients + kBackwardRows * kKeyBlock;  // (head_dim, kKeyBlock)
  float* v_transposed = k_transposed + p.head_dim * kKeyBlock;  // (head_dim_v, kKeyBlock)
  float* k = v_transposed + p.head_dim_v * kKeyBlock;           // (kKeyBlock, width)
  float* dk = k + kKeyBlock * width;                            // (kKeyBlock, width)
  float* dv = dk + kKeyBlock * width;                           // (kKeyBlock, value_width)
  int64_t k_offsets[kKeyBlock], v_offsets[kKeyBlock];

  for (int64_t r = 0; r < rows; ++r) {
    const ScoreRow row = score_row(p, s, task.kv_head, r);
    load_row(static_cast<const T*>(p.q) + row_offset(s, p.q_stride, row.query, row.head), p.head_dim, width, p.softmax_scale,
             q + r * width);
    float* gradient = dout + r * value_width;
    load_row(static_cast<const T*>(g.dout) + row_offset(s, g.dout_stride, row.query, row.head), p.head_dim_v, value_width,
             1.0f, gradient);
    const T* out = static_cast<const T*>(p.out) + row_offset(s, p.out_stride, row.query, row.head);
    Vec sum{};
    for (int64_t d = 0; d < p.head_dim_v; d += kLanes) sum += load(gradient + d) * load_first(out + d, p.head_dim_v - d);
    delta[r] = sum_of(sum);
    lse[r] = s.lse[row.head * s.lse_head_stride + row.query];
    for (int64_t d = 0; d < width; d += kLanes) store(dq + r * width + d, Vec{});
  }

  const T* k_base = static_cast<const T*>(p.k) + task.kv_head * p.k_stride[2];
  const T* v_base = static_cast<const T*>(p.v) + task.kv_head * p.v_stride[2];
  const int64_t group = p.heads / p.heads_kv;
  for (int64_t first = 0; first < s.keys; first += kKeyBlock) {
    const int64_t keys = min64(kKeyBlock, s.keys - first);
    key_offsets(p, s, first, keys, k_offsets, v_offsets);
    pack_transposed(k_base, k_offsets, keys, p.head_dim, k_transposed, kKeyBlock);
    pack_transposed(v_base, v_offsets, keys, p.head_dim_v, v_transposed, kKeyBlock);
    pack_rows(k_base, k_offsets, keys, p.head_dim, width, k);
    for (int64_t d = 0; d < keys * width; d += kLanes) store(dk + d, Vec{});
    for (int64_t d = 0; d < keys * value_width; d += kLanes) store(dv + d, Vec{});
    for (int64_t r = 0; r < rows; r += kBackwardRows) {
      const int64_t tile = min64(kBackwardRows, rows - r);
      if (visible_keys(p, s, (r + tile - 1) / group).end <= first) continue;
      if (visible_keys(p, s, r / group).begin >= first + keys) continue;
      gemm<false>(tile, keys, p.head_dim, q + r * width, width, 1, k_transposed, kKeyBlock, scores, kKeyBlock);
      gemm<false>(tile, keys, p.head_dim_v, dout + r * value_width, value_width, 1, v_transposed, kKeyBlock, gradients,
                  kKeyBlock);
      for (int64_t i = 0; i < tile; ++i) {
        score_gradients(p, s, score_row(p, s, task.kv_head, r + i), first, keys, lse[r + i], delta[r + i],
                        scores + i * kKeyBlock, gradients + i * kKeyBlock);
      }
      gemm<true>(keys, value_width, tile, scores, 1, kKeyBlock, dout + r * value_width, value_width, dv, value_width);
      gemm<true>(keys, width, tile, gradients, 1, kKeyBlock, q + r * width, width, dk, width);
      gemm<true>(tile, width, keys, gradients, kKeyBlock, 1, k, width, dq + r * width, width);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t row = s.key_row + first + j;
      store_scaled(
          dk + j * width, p.head_dim, 1.0f,
          static_cast<T*>(g.dk) + s.cache_row * g.dk_stride[0] + row * g.dk_stride[1] + task.kv_head * g.dk_stride[2]);
      store_scaled(
          dv + j * value_width, p.head_dim_v, 1.0f,
          static_cast<T*>(g.dv) + s.cache_row * g.dv_stride[0] + row * g.dv_stride[1] + task.kv_head * g.dv_stride[2]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const ScoreRow row = score_row(p, s, task.kv_head, r);
    store_scaled(dq + r * width, p.head_dim, p.softmax_scale,
                 static_cast<T*>(g.dq) + row_offset(s, g.dq_stride, row.query, row.head));
  }
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
