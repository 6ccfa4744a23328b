#include "csrc/cpu/probe.h"

#include <algorithm>

#include "csrc/cpu/scalar_score.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {
template <typename T>
void probe_row(const AttentionParams& p, const Sequence& s, int64_t query, float* probabilities) {
  const int64_t head = p.probe_head, kv_head = head / (p.heads / p.heads_kv);
  const double lse = static_cast<double>(s.lse[head * s.lse_head_stride + query]);
  const KeyRange visible = visible_keys(p, s, query);
  const T* q = static_cast<const T*>(p.q) + row_offset(s, p.q_stride, query, head);
  for (int64_t j = visible.begin; j < std::min(visible.end, p.probe_capacity); ++j) {
    int64_t k_offset, v_offset;
    key_offsets(p, s, j, 1, &k_offset, &v_offset);
    const T* k = static_cast<const T*>(p.k) + k_offset + kv_head * p.k_stride[2];
    const double score = scalar_score(p, s, head, query, j, q, k);
    probabilities[j] = score == -std::numeric_limits<double>::infinity() ? 0.0f : static_cast<float>(std::exp(score - lse));
  }
}
}  // namespace

void attention_probe(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  const auto write_row = p.dtype == DType::kFloat64    ? probe_row<double>
                         : p.dtype == DType::kBFloat16 ? probe_row<BFloat16>
                         : p.dtype == DType::kFloat16  ? probe_row<Float16>
                                                       : probe_row<float>;
  parallel_for(0, p.batch * p.probe_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Sequence& s = sequences[static_cast<size_t>(n / p.probe_rows)];
      const int64_t query = s.queries - p.probe_rows + n % p.probe_rows;  // the last row is the last query
      float* row = p.probe + n * p.probe_capacity;
      std::fill_n(row, p.probe_capacity, 0.0f);
      if (query >= 0) write_row(p, s, query, row);
    }
  });
}

}  // namespace vivace::cpu
