#include "csrc/cpu/cache.h"

#include <algorithm>
#include <cstring>

#include "csrc/cpu/rotate.h"
#include "csrc/error.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {

/// flash-attn's rule: causal and local calls rotate query i at the position of key i of the append, others every query at
/// the first of them.
bool queries_advance(const AttentionParams& p) { return p.causal || p.window_left >= 0 || p.window_right >= 0; }

Rotation rotation_of(const AttentionParams& p) {
  return Rotation(p.dtype, p.rotary_cos, p.rotary_sin, p.rotary_dtype, p.rotary_dim, p.rotary_interleaved);
}

/// The flattened rows of all sequences, `count` of each, as (sequence, row), over the threads.
template <typename Count, typename Body>
void for_each_row(const std::vector<Sequence>& sequences, int64_t row_size, const Count& count, const Body& body) {
  std::vector<int64_t> first(sequences.size() + 1, 0);
  for (size_t b = 0; b < sequences.size(); ++b) first[b + 1] = first[b] + count(sequences[b]);
  parallel_for(0, first.back(), 16384 / (row_size + 1) + 1, [&](int64_t begin, int64_t end) {
    auto state = body();
    size_t b = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t n = begin; n < end; ++n) {
      while (n >= first[b + 1]) ++b;
      state(sequences[b], n - first[b]);
    }
  });
}

}  // namespace

void check_cache(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  constexpr const char* kOp = "attention_with_kvcache";
  for (const Sequence& s : sequences) {
    check(s.cached >= 0 && s.keys <= p.seqlen_k, kOp, "row ", s.index, " of the cache has ", s.cached, " keys and gets ",
          s.appended, " more, ", s.keys, " in all; its capacity is ", p.seqlen_k);
    if (p.rotary_cos == nullptr) continue;
    const int64_t rotated = queries_advance(p) ? s.queries : std::min<int64_t>(s.queries, 1);
    const int64_t positions = s.cached + std::max(s.appended, rotated);
    check(positions <= p.rotary_positions, kOp, "rotary_cos has ", p.rotary_positions, " positions, row ", s.index,
          " needs ", positions);
  }
}

void append_to_cache(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  const int64_t size = size_of(p.dtype);
  for_each_row(
      sequences, p.heads_kv * (p.head_dim + p.head_dim_v), [](const Sequence& s) { return s.appended; },
      [&] {
        return [&p, size,
                rotate = p.rotary_cos != nullptr ? rotation_of(p) : Rotation(p.dtype, nullptr, nullptr, p.dtype, 0, false)](
                   const Sequence& s, int64_t row) mutable {
          int64_t k_offset, v_offset;
          key_offsets(p, s, s.cached + row, 1, &k_offset, &v_offset);
          const char* k_new = static_cast<const char*>(p.k_new) + row_offset(s, p.k_new_stride, row, 0) * size;
          const char* v_new = static_cast<const char*>(p.v_new) + row_offset(s, p.v_new_stride, row, 0) * size;
          char* k = static_cast<char*>(const_cast<void*>(p.k)) + k_offset * size;
          char* v = static_cast<char*>(const_cast<void*>(p.v)) + v_offset * size;
          if (p.rotary_cos != nullptr) {
            rotate({k_new, p.k_new_stride[2], k, p.k_stride[2], p.heads_kv, p.head_dim}, s.cached + row);
          }
          for (int64_t h = 0; h < p.heads_kv; ++h) {
            if (p.rotary_cos == nullptr) {
              std::memcpy(k + h * p.k_stride[2] * size, k_new + h * p.k_new_stride[2] * size,
                          static_cast<size_t>(p.head_dim * size));
            }
            std::memcpy(v + h * p.v_stride[2] * size, v_new + h * p.v_new_stride[2] * size,
                        static_cast<size_t>(p.head_dim_v * size));
          }
        };
      });
}

AttentionParams rotate_queries(const AttentionParams& p, const std::vector<Sequence>& sequences, std::vector<char>& memory) {
  const int64_t size = size_of(p.dtype);
  AttentionParams rotated = p;
  rotated.q_stride[2] = p.head_dim;
  rotated.q_stride[1] = p.heads * p.head_dim;
  rotated.q_stride[0] = p.cu_seqlens_q != nullptr ? 0 : p.seqlen_q * rotated.q_stride[1];
  memory.resize(
      static_cast<size_t>((p.cu_seqlens_q != nullptr ? p.total_q : p.batch * p.seqlen_q) * rotated.q_stride[1] * size));
  rotated.q = memory.data();
  const bool advance = queries_advance(p);
  for_each_row(
      sequences, p.heads * p.head_dim, [](const Sequence& s) { return s.queries; },
      [&] {
        return [&, rotate = rotation_of(p)](const Sequence& s, int64_t row) mutable {
          rotate({static_cast<const char*>(p.q) + row_offset(s, p.q_stride, row, 0) * size, p.q_stride[2],
                  memory.data() + row_offset(s, rotated.q_stride, row, 0) * size, rotated.q_stride[2], p.heads, p.head_dim},
                 s.cached + (advance ? row : 0));
        };
      });
  return rotated;
}

}  // namespace vivace::cpu
