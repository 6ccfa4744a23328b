// Attention on the CPU: resolves the call, appends to the cache, and cuts the work into tasks for the threads. The cut
// depends on each sequence's own lengths and the layout alone, so a call gives the same bits on any number of threads and in
// any batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "csrc/cpu/attention_double.h"
#include "csrc/cpu/cache.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/ops.h"
#include "csrc/cpu/probe.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/softmax_end.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {

constexpr int64_t kBlockRows = 96;   // q and the output of a task stay in the second cache, and packing K is a few percent
constexpr int64_t kChunkKeys = 128;  // keys of a task that reads them once, for all heads
constexpr int64_t kChunkKeysOfHead = 512;  // likewise, for one head

/// A task of either kind: rows first ... last - 1 against all keys, or a chunk of keys first ... last - 1.
struct Task {
  const Sequence* sequence;
  int64_t kv_begin, kv_end;
  int64_t first, last;
  int64_t partial;  // row in the partial results; -1: not a chunk
};

/// A sequence of few queries: its rows' partial results, in the order chunk, kv head, row.
struct Split {
  const Sequence* sequence;
  int64_t rows, chunks, partial;
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Split> splits;
  int64_t partial_rows = 0;
};

void plan_chunks(const AttentionParams& p, const Sequence& s, int64_t rows, Plan& plan) {
  const int64_t begin = visible_keys(p, s, 0).begin, end = visible_keys(p, s, s.queries - 1).end;
  const int64_t keys = std::max<int64_t>(end - begin, 0);
  // Where the heads of a key lie side by side, one task reads them all; otherwise each head is a stream of its own.
  const bool side_by_side = p.k_stride[2] < p.k_stride[1];
  const int64_t heads = side_by_side ? std::max<int64_t>(kChunkHeadRows / rows, 1) : 1;
  const int64_t most = side_by_side ? kChunkKeys : kChunkKeysOfHead;
  const int64_t chunks = std::max<int64_t>((keys + most - 1) / most, 1);
  const int64_t size = ((keys + chunks - 1) / chunks + 15) / 16 * 16;
  plan.splits.push_back({&s, rows, chunks, plan.partial_rows});
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = begin + chunk * size, last = std::min(first + size, begin + keys);
    for (int64_t h = 0; h < p.heads_kv; h += heads) {
      plan.tasks.push_back(
          {&s, h, std::min(h + heads, p.heads_kv), first, std::max(first, last), plan.partial_rows + h * rows});
    }
    plan.partial_rows += p.heads_kv * rows;
  }
}

void plan_blocks(const AttentionParams& p, const Sequence& s, int64_t rows, Plan& plan) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t h = 0; h < p.heads_kv; ++h) {
    for (int64_t n = 0; n < blocks; ++n) {
      // First, last, second, last but one ...: under a causal mask late rows see more, and threads take neighbouring tasks.
      const int64_t block = n % 2 == 0 ? n / 2 : blocks - 1 - n / 2;
      plan.tasks.push_back({&s, h, h + 1, block * kBlockRows, std::min((block + 1) * kBlockRows, rows), -1});
    }
  }
}

Plan plan_tasks(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  Plan plan;
  for (const Sequence& s : sequences) {
    const int64_t rows = s.queries * (p.heads / p.heads_kv);
    if (rows == 0) continue;
    if (rows <= kMaxChunkRows) {
      plan_chunks(p, s, rows, plan);
    } else {
      plan_blocks(p, s, rows, plan);
    }
  }
  return plan;
}

void run_tasks(const AttentionParams& p, const Plan& plan, float* partial) {
  const TypedKernels& kernel = kernels().of(p.dtype);
  parallel_for(0, static_cast<int64_t>(plan.tasks.size()), 1, [&](int64_t begin, int64_t end) {
    float* scratch = thread_scratch(std::max(attention_block_scratch(p.head_dim, p.head_dim_v, kBlockRows),
                                             attention_chunk_scratch(p.head_dim, kChunkHeadRows)));
    for (int64_t n = begin; n < end; ++n) {
      const Task& t = plan.tasks[static_cast<size_t>(n)];
      if (t.partial >= 0) {
        kernel.attention_chunk({&p, t.sequence, t.kv_begin, t.kv_end, t.first, t.last,
                                partial + t.partial * partial_stride(p.head_dim_v), scratch});
      } else {
        kernel.attention_block({&p, t.sequence, t.kv_begin, t.first, t.last, scratch});
      }
    }
  });
}

/// Merges the chunks of one row: out = sum of out_c e^(max_c - max) / sum of sum_c e^(max_c - max).
template <typename T>
void combine_row(const AttentionParams& p, const Split& split, const float* partial, int64_t n, float* sum_out) {
  const int64_t group = p.heads / p.heads_kv, width = p.head_dim_v, stride = partial_stride(width);
  const int64_t query = n % split.rows / group, head = n / split.rows * group + n % group;
  const int64_t step = p.heads_kv * split.rows * stride;
  const float* first = partial + (split.partial + n) * stride;
  float largest = -__builtin_inff(), sum = 0.0f;
  for (int64_t c = 0; c < split.chunks; ++c) largest = std::max(largest, first[c * step + padded(width)]);
  const float shift = largest == -__builtin_inff() ? 0.0f : largest;
  std::fill_n(sum_out, width, 0.0f);
  for (int64_t c = 0; c < split.chunks; ++c) {
    const float* out = first + c * step;
    if (out[padded(width) + 1] == 0.0f) continue;  // saw nothing
    const float factor = std::exp(out[padded(width)] - shift);
    sum += out[padded(width) + 1] * factor;
    for (int64_t d = 0; d < width; ++d) sum_out[d] += out[d] * factor;
  }
  const Sequence& s = *split.sequence;
  const SoftmaxEnd end = softmax_end(p, head, largest, sum);
  T* to = static_cast<T*>(p.out) + row_offset(s, p.out_stride, query, head);
  for (int64_t d = 0; d < width; ++d) to[d] = from_float<T>(sum_out[d] * end.scale);
  if (s.lse != nullptr) s.lse[head * s.lse_head_stride + query] = end.lse;
}

void combine(const AttentionParams& p, const Plan& plan, const float* partial) {
  const auto row = p.dtype == DType::kBFloat16  ? combine_row<BFloat16>
                   : p.dtype == DType::kFloat16 ? combine_row<Float16>
                                                : combine_row<float>;
  constexpr int64_t kHeadsWorthAThread = 64;
  parallel_for(0, static_cast<int64_t>(plan.splits.size()), kHeadsWorthAThread / p.heads + 1,
               [&](int64_t begin, int64_t end) {
                 float* sum = thread_scratch(p.head_dim_v);
                 for (int64_t i = begin; i < end; ++i) {
                   const Split& split = plan.splits[static_cast<size_t>(i)];
                   for (int64_t n = 0; n < p.heads_kv * split.rows; ++n) row(p, split, partial, n, sum);
                 }
               });
}

/// out 0 and lse -inf for one row of q.
void clear_row(const AttentionParams& p, char* out, float* lse, int64_t lse_head_stride) {
  const int64_t size = size_of(p.dtype);
  for (int64_t h = 0; h < p.heads; ++h) {
    std::memset(out + h * p.out_stride[2] * size, 0, static_cast<size_t>(p.head_dim_v * size));
    if (lse != nullptr) lse[h * lse_head_stride] = -__builtin_inff();
  }
}

/// Rows of q that no sequence uses: past seqused_q, and past the last of cu_seqlens_q.
void clear_unused_rows(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  const int64_t size = size_of(p.dtype);
  char* out = static_cast<char*>(p.out);
  for (const Sequence& s : sequences) {
    for (int64_t row = s.queries; row < s.query_rows; ++row) {
      clear_row(p, out + row_offset(s, p.out_stride, row, 0) * size, s.lse != nullptr ? s.lse + row : nullptr,
                s.lse_head_stride);
    }
  }
  if (p.cu_seqlens_q == nullptr) return;
  for (int64_t row = p.cu_seqlens_q[p.batch]; row < p.total_q; ++row) {
    clear_row(p, out + row * p.out_stride[1] * size, p.lse != nullptr ? p.lse + row : nullptr, p.total_q);
  }
}

}  // namespace

void attention_forward(const AttentionParams& params) {
  const std::vector<Sequence> sequences = resolve_sequences(params);
  AttentionParams p = params;
  std::vector<char> rotated;
  if (p.has_cache) {
    check_cache(p, sequences);
    if (p.k_new != nullptr) append_to_cache(p, sequences);
    if (p.rotary_cos != nullptr) p = rotate_queries(params, sequences, rotated);
  }
  clear_unused_rows(p, sequences);
  if (p.dtype == DType::kFloat64) {
    attention_forward_double(p, sequences);
  } else {
    const Plan plan = plan_tasks(p, sequences);
    std::vector<float> partial(static_cast<size_t>(plan.partial_rows * partial_stride(p.head_dim_v)));
    run_tasks(p, plan, partial.data());
    combine(p, plan, partial.data());
  }
  if (p.probe != nullptr) attention_probe(p, sequences);
}

}  // namespace vivace::cpu
