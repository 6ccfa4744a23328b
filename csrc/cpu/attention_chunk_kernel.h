// Few queries against a long row of keys. Reading the keys is all the work, so they are read once and in the order in which
// they lie: all kv heads of a key, then the next key.
#pragma once

#include "csrc/cpu/gemm.h"
#include "csrc/cpu/score_kernel.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

constexpr int kKeysAtOnce = 4;  // dot products that share a load of q and a sum over lanes
constexpr int kPrefetch = 8;    // keys ahead
constexpr int kReach = kPrefetch + kKeysAtOnce;

/// scores[0 ... 3] = q . k of four keys. q is padded with zeros.
template <typename T>
VIVACE_INLINE void dot_four(const float* q, const T* const (&k)[kKeysAtOnce], int64_t width, float* scores) {
  Vec a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec x = load(q + i);
    a += x * load(k[0] + i);
    b += x * load(k[1] + i);
    c += x * load(k[2] + i);
    d += x * load(k[3] + i);
  }
  if (i < width) {
    const Vec x = load(q + i);
    a += x * load_first(k[0] + i, width - i);
    b += x * load_first(k[1] + i, width - i);
    c += x * load_first(k[2] + i, width - i);
    d += x * load_first(k[3] + i, width - i);
  }
  sum_four(a, b, c, d, scores);
}

/// out += p . v over four values.
template <typename T>
VIVACE_INLINE void add_four(const float* p, const T* const (&v)[kKeysAtOnce], int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec sum = (load(v[0] + i) * p[0] + load(v[1] + i) * p[1]) + (load(v[2] + i) * p[2] + load(v[3] + i) * p[3]);
    store(out + i, load(out + i) + sum);
  }
  if (i < width) {
    const Vec sum = (load_first(v[0] + i, width - i) * p[0] + load_first(v[1] + i, width - i) * p[1]) +
                    (load_first(v[2] + i, width - i) * p[2] + load_first(v[3] + i, width - i) * p[3]);
    store(out + i, load(out + i) + sum);
  }
}

/// Brings a row of one head nearer. Rows of a cache are pages apart, too far for the machine's own prefetchers.
template <typename T>
VIVACE_INLINE void prefetch_row(const T* row, int64_t width) {
  // A line of 16-bit elements; of fp32 every other line, since the neighbour comes along and loads are dearer there.
  for (int64_t i = 0; i < width; i += 32) __builtin_prefetch(row + i);
}

template <typename T>
void attention_chunk(const AttentionChunk& task) {
  const AttentionParams& p = *task.params;
  const Sequence& s = *task.sequence;
  const int64_t group = p.heads / p.heads_kv;
  const int64_t rows = s.queries * group;  // of one kv head
  const int64_t kv_heads = task.kv_end - task.kv_begin;
  const int64_t width = padded(p.head_dim), value_width = padded(p.head_dim_v), stride = partial_stride(p.head_dim_v);
  float* q = task.scratch;                      // (kv_heads, rows, width), times softmax_scale
  float* scores = q + kv_heads * rows * width;  // (kv_heads, rows, kKeyBlock)
  // The last group of four repeats the last key, whose score is masked; prefetches reach as far again.
  int64_t k_offsets[kKeyBlock + kReach], v_offsets[kKeyBlock + kReach];
  ScoreRow score_rows[kChunkHeadRows];

  int64_t key_begin = task.key_end, key_end = task.key_begin;
  for (int64_t n = 0; n < kv_heads * rows; ++n) {
    score_rows[n] = score_row(p, s, task.kv_begin + n / rows, n % rows);
    const ScoreRow& row = score_rows[n];
    load_row(static_cast<const T*>(p.q) + row_offset(s, p.q_stride, row.query, row.head), p.head_dim, width, p.softmax_scale,
             q + n * width);
    float* partial = task.partial + n * stride;
    for (int64_t d = 0; d < value_width; ++d) partial[d] = 0.0f;
    partial[value_width] = -kInfinity;
    partial[value_width + 1] = 0.0f;
    key_begin = min64(key_begin, max64(row.visible.begin, task.key_begin));
    key_end = max64(key_end, min64(row.visible.end, task.key_end));
  }

  const T* k_base = static_cast<const T*>(p.k);
  const T* v_base = static_cast<const T*>(p.v);
  for (int64_t first = key_begin; first < key_end; first += kKeyBlock) {
    const int64_t keys = min64(kKeyBlock, key_end - first);
    key_offsets(p, s, first, keys, k_offsets, v_offsets);
    for (int64_t j = keys; j < keys + kReach; ++j) {
      k_offsets[j] = k_offsets[keys - 1];
      v_offsets[j] = v_offsets[keys - 1];
    }
    for (int64_t j = 0; j < keys; j += kKeysAtOnce) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t head = (task.kv_begin + h) * p.k_stride[2];
        const T* const k[kKeysAtOnce] = {k_base + k_offsets[j] + head, k_base + k_offsets[j + 1] + head,
                                         k_base + k_offsets[j + 2] + head, k_base + k_offsets[j + 3] + head};
        for (int64_t i = j + kPrefetch; i < j + kReach; ++i) prefetch_row(k_base + k_offsets[i] + head, p.head_dim);
        for (int64_t r = h * rows; r < (h + 1) * rows; ++r)
          dot_four(q + r * width, k, p.head_dim, scores + r * kKeyBlock + j);
      }
    }
    for (int64_t n = 0; n < kv_heads * rows; ++n) {
      float* probabilities = scores + n * kKeyBlock;
      float* partial = task.partial + n * stride;
      finish_scores(p, s, score_rows[n], first, keys, probabilities);
      const float factor = online_softmax(keys, probabilities, partial[value_width], partial[value_width + 1]);
      if (factor != 1.0f) {
        for (int64_t d = 0; d < value_width; d += kLanes) store(partial + d, load(partial + d) * factor);
      }
      if (p.dropout_p > 0.0f) drop(p, s, score_rows[n], first, keys, probabilities);
      for (int64_t j = keys; j % kKeysAtOnce != 0; ++j) probabilities[j] = 0.0f;
    }
    for (int64_t j = 0; j < keys; j += kKeysAtOnce) {
      for (int64_t h = 0; h < kv_heads; ++h) {
        const int64_t head = (task.kv_begin + h) * p.v_stride[2];
        const T* const v[kKeysAtOnce] = {v_base + v_offsets[j] + head, v_base + v_offsets[j + 1] + head,
                                         v_base + v_offsets[j + 2] + head, v_base + v_offsets[j + 3] + head};
        for (int64_t i = j + kPrefetch; i < j + kReach; ++i) prefetch_row(v_base + v_offsets[i] + head, p.head_dim_v);
        for (int64_t r = h * rows; r < (h + 1) * rows; ++r) {
          const float* weights = scores + r * kKeyBlock + j;
          float* out = task.partial + r * stride;
          if (weights[0] != 0.0f && weights[1] != 0.0f && weights[2] != 0.0f && weights[3] != 0.0f) {
            add_four(weights, v, p.head_dim_v, out);
            continue;
          }
          for (int i = 0; i < kKeysAtOnce; ++i) {  // a probability of 0 keeps what is not finite in its value out
            if (weights[i] == 0.0f) continue;
            for (int64_t d = 0; d < p.head_dim_v; d += kLanes) {
              store(out + d, load(out + d) + load_first(v[i] + d, p.head_dim_v - d) * weights[i]);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
