#include "csrc/cpu/sequence.h"

#include <algorithm>
#include <limits>

#include "kernels/common/philox.h"

namespace vivace::cpu {

std::vector<Sequence> resolve_sequences(const AttentionParams& p) {
  std::vector<Sequence> sequences(static_cast<size_t>(p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    Sequence& s = sequences[static_cast<size_t>(b)];
    s.index = b;
    s.query_rows = p.cu_seqlens_q != nullptr ? int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b] : p.seqlen_q;
    s.query_row = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[b] : 0;
    s.queries = p.seqused_q != nullptr ? std::min<int64_t>(p.seqused_q[b], s.query_rows) : s.query_rows;
    s.pages = p.block_table != nullptr ? p.block_table + b * p.block_table_stride : nullptr;
    if (p.has_cache) {
      s.cache_row = p.cache_batch_idx != nullptr ? p.cache_batch_idx[b] : b;
      s.cached = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.seqlen_k;
      if (p.k_new != nullptr) s.appended = p.cu_seqlens_q != nullptr ? s.queries : p.seqlen_new;
      s.keys = s.cached + s.appended;
      s.key_rows = p.seqlen_k;
    } else {
      const bool varlen = p.cu_seqlens_k != nullptr && s.pages == nullptr;
      s.key_row = varlen ? p.cu_seqlens_k[b] : 0;
      s.cache_row = varlen ? 0 : b;
      s.key_rows = p.cu_seqlens_k != nullptr ? int64_t{p.cu_seqlens_k[b + 1]} - p.cu_seqlens_k[b] : p.seqlen_k;
      s.keys = p.seqused_k != nullptr ? p.seqused_k[b] : s.key_rows;
    }
    s.first_key = p.cache_leftpad != nullptr ? std::min<int64_t>(p.cache_leftpad[b], s.keys) : 0;
    s.lse_head_stride = p.cu_seqlens_q != nullptr ? p.total_q : p.seqlen_q;
    s.lse = p.lse == nullptr ? nullptr : p.lse + (p.cu_seqlens_q != nullptr ? s.query_row : b * p.heads * p.seqlen_q);
  }
  return sequences;
}

void key_offsets(const AttentionParams& p, const Sequence& s, int64_t first, int64_t count, int64_t* k, int64_t* v) {
  for (int64_t n = 0; n < count; ++n) {
    const int64_t j = first + n;
    const int64_t entry = s.pages != nullptr ? s.pages[j / p.page_size] : s.cache_row;
    const int64_t row = s.pages != nullptr ? j % p.page_size : s.key_row + j;
    k[n] = entry * p.k_stride[0] + row * p.k_stride[1];
    v[n] = entry * p.v_stride[0] + row * p.v_stride[1];
  }
}

namespace {
template <typename T>
void load_bias_of(const void* bias, int64_t offset, int64_t stride, int64_t count, float* out) {
  const T* source = static_cast<const T*>(bias) + offset;
  for (int64_t n = 0; n < count; ++n) out[n] = to_float(source[n * stride]);
}
}  // namespace

void load_bias(const AttentionParams& p, int64_t b, int64_t head, int64_t query, int64_t first, int64_t count, float* out) {
  const int64_t stride = p.bias_stride[3];
  const int64_t offset = b * p.bias_stride[0] + head * p.bias_stride[1] + query * p.bias_stride[2] + first * stride;
  switch (p.bias_dtype) {
    case DType::kBFloat16: return load_bias_of<BFloat16>(p.bias, offset, stride, count, out);
    case DType::kFloat16: return load_bias_of<Float16>(p.bias, offset, stride, count, out);
    case DType::kFloat64: {
      const double* source = static_cast<const double*>(p.bias) + offset;
      for (int64_t n = 0; n < count; ++n) out[n] = static_cast<float>(source[n * stride]);
      return;
    }
    case DType::kBool:
    case DType::kUInt8: {
      const uint8_t* source = static_cast<const uint8_t*>(p.bias) + offset;
      for (int64_t n = 0; n < count; ++n) out[n] = source[n * stride] != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
      return;
    }
    default: return load_bias_of<float>(p.bias, offset, stride, count, out);
  }
}

void load_dropout(const AttentionParams& p, int64_t b, int64_t head, int64_t query, int64_t first, int64_t count,
                  float* kept) {
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const int64_t head_row = b * p.heads + head;
  for (int64_t j = first; j < first + count;) {
    const Philox4 draw = dropout_draw(p.rng_state[0], p.rng_state[1], head_row, query, j);
    for (const int64_t end = std::min(first + count, (j / 16 + 1) * 16); j < end; ++j) {
      kept[j - first] = dropout_byte(draw, static_cast<int>(j & 15)) <= threshold ? 1.0f : 0.0f;
    }
  }
}

}  // namespace vivace::cpu
