#include <algorithm>
#include <cstring>
#include <vector>

#include "csrc/cpu/attention_double.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/cpu/scratch.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {

/// Zeroes a gradient of (batch, rows, heads, width), or of (rows, heads, width) with batch 1.
void clear(void* gradient, const int64_t (&stride)[3], DType dtype, int64_t batch, int64_t rows, int64_t heads,
           int64_t width) {
  const int64_t size = size_of(dtype);
  for (int64_t n = 0; n < batch * rows * heads; ++n) {
    const int64_t b = n / (rows * heads), row = n / heads % rows, head = n % heads;
    std::memset(static_cast<char*>(gradient) + (b * stride[0] + row * stride[1] + head * stride[2]) * size, 0,
                static_cast<size_t>(width * size));
  }
}

/// Every row, so that those which nothing reaches (past seqused or cu_seqlens, or of empty sequences) are 0.
void clear_gradients(const AttentionBackwardParams& g) {
  const AttentionParams& p = g.forward;
  const bool varlen_q = p.cu_seqlens_q != nullptr, varlen_k = p.cu_seqlens_k != nullptr;
  clear(g.dq, g.dq_stride, p.dtype, varlen_q ? 1 : p.batch, varlen_q ? p.total_q : p.seqlen_q, p.heads, p.head_dim);
  clear(g.dk, g.dk_stride, p.dtype, varlen_k ? 1 : p.batch, varlen_k ? p.total_k : p.seqlen_k, p.heads_kv, p.head_dim);
  clear(g.dv, g.dv_stride, p.dtype, varlen_k ? 1 : p.batch, varlen_k ? p.total_k : p.seqlen_k, p.heads_kv, p.head_dim_v);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& g) {
  const AttentionParams& p = g.forward;
  const std::vector<Sequence> sequences = resolve_sequences(p);
  clear_gradients(g);
  if (p.dtype == DType::kFloat64) return attention_backward_double(g, sequences);
  int64_t rows = 0;
  for (const Sequence& s : sequences) rows = std::max(rows, s.queries * (p.heads / p.heads_kv));
  const auto kernel = kernels().of(p.dtype).attention_backward;
  parallel_for(0, p.batch * p.heads_kv, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(attention_backward_scratch(p.head_dim, p.head_dim_v, rows)));
    for (int64_t n = begin; n < end; ++n) {
      kernel({&g, &sequences[static_cast<size_t>(n / p.heads_kv)], n % p.heads_kv, scratch.data()});
    }
  });
}

}  // namespace vivace::cpu
