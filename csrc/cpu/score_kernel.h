// What happens to a row of scores between q . k and the values: softcap, ALiBi, bias, mask, online softmax.
#pragma once

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/vector.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

/// The query of a row of scores, and what is the same for all of its keys.
struct ScoreRow {
  int64_t query, head;
  KeyRange visible;
  float slope;
  int64_t diagonal;  // the key at the query's own position
};

VIVACE_INLINE ScoreRow score_row(const AttentionParams& p, const Sequence& s, int64_t kv_head, int64_t row) {
  const int64_t group = p.heads / p.heads_kv;
  ScoreRow r;
  r.query = group == 1 ? row : row / group;
  r.head = kv_head * group + (group == 1 ? 0 : row % group);
  r.visible = visible_keys(p, s, r.query);
  r.slope = p.alibi_slopes != nullptr ? p.alibi_slopes[s.index * p.alibi_batch_stride + r.head] : 0.0f;
  r.diagonal = r.query + s.keys - s.queries;
  return r;
}

/// Turns the products scores[0 ... count - 1] with the keys first ... first + count - 1 into scores; what is not visible is
/// -inf. Whole vectors are written, their lanes past count -inf.
VIVACE_INLINE void finish_scores(const AttentionParams& p, const Sequence& s, const ScoreRow& row, int64_t first,
                                 int64_t count, float* scores) {
  const int64_t begin = row.visible.begin - first, end = min64(row.visible.end - first, count);
  if (p.softcap > 0.0f) {
    const float inverse = 1.0f / p.softcap;
    for (int64_t j = 0; j < count; j += kLanes) store(scores + j, tanh(load(scores + j) * inverse) * p.softcap);
  }
  if (p.alibi_slopes != nullptr) {
    const VecI lanes = iota();
    for (int64_t j = 0; j < count; j += kLanes) {
      const VecI distance = lanes + static_cast<int32_t>(first + j - row.diagonal);
      store(scores + j, load(scores + j) - absolute(__builtin_convertvector(distance, Vec)) * row.slope);
    }
  }
  if (p.bias != nullptr) {
    float bias[kKeyBlock];
    load_bias(p, s.index, row.head, row.query, first, count, bias);
    for (int64_t j = count; j % kLanes != 0; ++j) bias[j] = 0.0f;
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec b = load(bias + j);
      store(scores + j, b == -kInfinity ? b : load(scores + j) + b);  // hidden even where the product is NaN
    }
  }
  if (begin > 0 || end < count || count % kLanes != 0) {
    const VecI lanes = iota();
    const VecI from = broadcast_int(static_cast<int32_t>(max64(-1, min64(begin, kKeyBlock))));
    const VecI to = broadcast_int(static_cast<int32_t>(max64(0, end)));
    for (int64_t j = 0; j < count; j += kLanes) {
      const VecI column = lanes + static_cast<int32_t>(j);
      store(scores + j, ((column >= from) & (column < to)) != 0 ? load(scores + j) : broadcast(-kInfinity));
    }
  }
}

/// scores becomes probabilities relative to the new maximum; `largest` and `sum` are carried along. Returns the factor for
/// what was accumulated before. A hidden key gets exactly 0; a NaN makes the sum NaN.
VIVACE_INLINE float online_softmax(int64_t count, float* scores, float& largest, float& sum) {
  Vec top = load(scores);
  for (int64_t j = kLanes; j < count; j += kLanes) top = maximum(load(scores + j), top);
  const float before = largest, block = max_of(top);
  largest = block > before ? block : before;
  const float shift = largest == -kInfinity ? 0.0f : largest;
  Vec total{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec probability = exp(load(scores + j) - shift);
    store(scores + j, probability);
    total += probability;
  }
  const float factor = before == largest ? 1.0f : exp(broadcast(before - shift))[0];
  sum = sum * factor + sum_of(total);
  return factor;
}

/// scores *= kept / (1 - p) is left to the end of the row: only what dropout removes is set to 0 here.
VIVACE_INLINE void drop(const AttentionParams& p, const Sequence& s, const ScoreRow& row, int64_t first, int64_t count,
                        float* probabilities) {
  float kept[kKeyBlock];
  load_dropout(p, s.index, row.head, row.query, first, count, kept);
  for (int64_t j = 0; j < count; ++j) probabilities[j] = kept[j] != 0.0f ? probabilities[j] : 0.0f;
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
