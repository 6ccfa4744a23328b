// The static KV buffers and who has which of their rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace vivace {

/// Rows are handed out and taken back by the worker alone. A row that is handed out again need not be cleared: nothing past
/// a row's length is read, and work queued for its last user runs before its next one's.
class KvCache {
 public:
  /// k, v: (layers, cache rows, capacity, heads_kv, head_dim). With `scratch` the last row is nobody's: it takes what
  /// padding rows of a step write.
  KvCache(at::Tensor k, at::Tensor v, bool scratch) : k_(std::move(k)), v_(std::move(v)), scratch_(scratch) {
    for (int64_t row = k_.size(1) - (scratch ? 2 : 1); row >= 0; --row) free_.push_back(static_cast<int32_t>(row));
  }

  const at::Tensor& k() const { return k_; }
  const at::Tensor& v() const { return v_; }
  int64_t capacity() const { return k_.size(2); }
  /// Of all positions; what lies between two heads (see Model::cache_pitch) is not counted.
  int64_t bytes() const { return static_cast<int64_t>(k_.nbytes() + v_.nbytes()); }
  /// Negative: there is none.
  int32_t scratch_row() const { return scratch_ ? static_cast<int32_t>(k_.size(1) - 1) : -1; }

  int64_t free_rows() const { return static_cast<int64_t>(free_.size()); }
  int32_t take() {
    const int32_t row = free_.back();
    free_.pop_back();
    return row;
  }
  void give_back(int32_t row) { free_.push_back(row); }

 private:
  at::Tensor k_, v_;
  bool scratch_;
  std::vector<int32_t> free_;
};

}  // namespace vivace
