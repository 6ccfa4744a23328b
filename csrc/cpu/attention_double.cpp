#include "csrc/cpu/attention_double.h"

#include <algorithm>

#include "csrc/cpu/scalar_score.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {

constexpr double kHidden = -std::numeric_limits<double>::infinity();

/// The probabilities of one row.
struct Row {
  KeyRange visible{0, 0};
  std::vector<double> probability;  // of key visible.begin + n; exactly 0 where hidden
  std::vector<double> softcap_slope;
  std::vector<float> kept;  // dropout
  std::vector<int64_t> k_offset, v_offset;
  double lse = kHidden;

  void compute(const AttentionParams& p, const Sequence& s, int64_t head, int64_t query) {
    const int64_t kv_head = head / (p.heads / p.heads_kv);
    visible = visible_keys(p, s, query);
    const int64_t count = visible.end - visible.begin;
    const size_t n = static_cast<size_t>(count);
    probability.assign(n, kHidden);
    softcap_slope.assign(n, 1.0);
    kept.assign(n, 1.0f);
    k_offset.resize(n);
    v_offset.resize(n);
    lse = kHidden;
    key_offsets(p, s, visible.begin, count, k_offset.data(), v_offset.data());
    if (p.dropout_p > 0.0f) load_dropout(p, s.index, head, query, visible.begin, count, kept.data());
    const double* q = static_cast<const double*>(p.q) + row_offset(s, p.q_stride, query, head);
    double largest = kHidden;
    for (size_t j = 0; j < n; ++j) {
      k_offset[j] += kv_head * p.k_stride[2];
      v_offset[j] += kv_head * p.v_stride[2];
      probability[j] = scalar_score(p, s, head, query, visible.begin + static_cast<int64_t>(j), q,
                                    static_cast<const double*>(p.k) + k_offset[j], &softcap_slope[j]);
      if (probability[j] > largest) largest = probability[j];
    }
    const bool empty = std::all_of(probability.begin(), probability.end(), [](double x) { return x == kHidden; });
    if (empty) {
      std::fill(probability.begin(), probability.end(), 0.0);
      return;
    }
    const double shift = largest == kHidden ? 0.0 : largest;  // all NaN
    double sum = 0.0;
    for (double& x : probability) sum += (x = x == kHidden ? 0.0 : std::exp(x - shift));
    lse = shift + std::log(sum);
    if (p.sinks != nullptr) {
      const double sink = static_cast<double>(p.sinks[head]), top = std::max(lse, sink);
      lse = top + std::log(std::exp(lse - top) + std::exp(sink - top));
    }
    const double factor = std::exp(shift - lse);
    for (double& x : probability) {
      if (x != 0.0) x *= factor;
    }
  }
};

}  // namespace

void attention_forward_double(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  const double survivors = 1.0 / (1.0 - static_cast<double>(p.dropout_p));
  parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) {
    Row row;
    std::vector<double> sum(static_cast<size_t>(p.head_dim_v));
    for (int64_t n = begin; n < end; ++n) {
      const Sequence& s = sequences[static_cast<size_t>(n / p.heads)];
      const int64_t head = n % p.heads;
      for (int64_t query = 0; query < s.queries; ++query) {
        row.compute(p, s, head, query);
        std::fill(sum.begin(), sum.end(), 0.0);
        for (size_t j = 0; j < row.probability.size(); ++j) {
          if (row.probability[j] == 0.0 || row.kept[j] == 0.0f) continue;
          const double* v = static_cast<const double*>(p.v) + row.v_offset[j];
          for (size_t d = 0; d < sum.size(); ++d) sum[d] += row.probability[j] * survivors * v[d];
        }
        std::copy(sum.begin(), sum.end(), static_cast<double*>(p.out) + row_offset(s, p.out_stride, query, head));
        if (s.lse != nullptr) s.lse[head * s.lse_head_stride + query] = static_cast<float>(row.lse);
      }
    }
  });
}

void attention_backward_double(const AttentionBackwardParams& g, const std::vector<Sequence>& sequences) {
  const AttentionParams& p = g.forward;
  const double survivors = 1.0 / (1.0 - static_cast<double>(p.dropout_p)), scale = static_cast<double>(p.softmax_scale);
  const int64_t group = p.heads / p.heads_kv;
  // dk and dv were zeroed; one thread adds to a kv head's rows of them.
  parallel_for(0, p.batch * p.heads_kv, 1, [&](int64_t begin, int64_t end) {
    Row row;
    std::vector<double> gradient;
    for (int64_t n = begin; n < end; ++n) {
      const Sequence& s = sequences[static_cast<size_t>(n / p.heads_kv)];
      const int64_t kv_head = n % p.heads_kv;
      for (int64_t r = 0; r < s.queries * group; ++r) {
        const int64_t query = r / group, head = kv_head * group + r % group;
        row.compute(p, s, head, query);
        const double* q = static_cast<const double*>(p.q) + row_offset(s, p.q_stride, query, head);
        const double* dout = static_cast<const double*>(g.dout) + row_offset(s, g.dout_stride, query, head);
        double* dq = static_cast<double*>(g.dq) + row_offset(s, g.dq_stride, query, head);
        gradient.assign(row.probability.size(), 0.0);
        double delta = 0.0;
        for (size_t j = 0; j < gradient.size(); ++j) {
          const double* v = static_cast<const double*>(p.v) + row.v_offset[j];
          if (row.kept[j] == 0.0f || row.probability[j] == 0.0) continue;
          for (int64_t d = 0; d < p.head_dim_v; ++d) gradient[j] += dout[d] * v[d] * survivors;
          delta += row.probability[j] * gradient[j];
        }
        for (size_t j = 0; j < gradient.size(); ++j) {
          if (row.probability[j] == 0.0) continue;
          const int64_t key = s.key_row + row.visible.begin + static_cast<int64_t>(j);
          const double* k = static_cast<const double*>(p.k) + row.k_offset[j];
          double* dk =
              static_cast<double*>(g.dk) + s.cache_row * g.dk_stride[0] + key * g.dk_stride[1] + kv_head * g.dk_stride[2];
          double* dv =
              static_cast<double*>(g.dv) + s.cache_row * g.dv_stride[0] + key * g.dv_stride[1] + kv_head * g.dv_stride[2];
          const double ds = row.probability[j] * (gradient[j] - delta) * row.softcap_slope[j] * scale;
          const double kept = row.kept[j] != 0.0f ? row.probability[j] * survivors : 0.0;
          for (int64_t d = 0; d < p.head_dim; ++d) {
            dq[d] += ds * k[d];
            dk[d] += ds * q[d];
          }
          for (int64_t d = 0; d < p.head_dim_v; ++d) dv[d] += kept * dout[d];
        }
      }
    }
  });
}

}  // namespace vivace::cpu
