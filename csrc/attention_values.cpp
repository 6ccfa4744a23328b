#include "csrc/attention_values.h"

#include <algorithm>

namespace vivace {

namespace {

void check_cu_seqlens(const Checker& check, const int32_t* cu, const char* name, int64_t batch, int64_t total,
                      int64_t longest) {
  check(cu[0] == 0, name, "[0] is ", cu[0], ", expected 0");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{cu[b + 1]} - cu[b];
    check(length >= 0, name, " decreases from ", cu[b], " to ", cu[b + 1], " at row ", b);
    check(length <= longest, name, " gives row ", b, " a length of ", length, ", max_seqlen is ", longest);
  }
  check(total < 0 || cu[batch] <= total, name, " ends at ", cu[batch], ", the tensor has ", total, " rows");
}

void check_lengths(const Checker& check, const int32_t* lengths, const char* name, int64_t batch, int64_t longest) {
  for (int64_t b = 0; lengths != nullptr && b < batch; ++b) {
    check(lengths[b] >= 0 && lengths[b] <= longest, name, "[", b, "] is ", lengths[b], ", expected 0 to ", longest);
  }
}

/// The pages that row b needs for `length` keys.
void check_pages(const Checker& check, const AttentionArgs& a, const AttentionParams& p, int64_t b, int64_t length) {
  const int64_t pages = a.k.size(0), columns = a.block_table.size(1);
  const int64_t needed = (length + p.page_size - 1) / p.page_size;
  check(needed <= columns, "block_table has ", columns, " pages of ", p.page_size, " keys for row ", b, ", which has ",
        length, " keys");
  for (int64_t i = 0; i < needed; ++i) {
    const int32_t page = p.block_table[b * p.block_table_stride + i];
    check(page >= 0 && page < pages, "block_table[", b, ", ", i, "] is ", page, ", expected 0 to ", pages - 1);
  }
}

}  // namespace

void check_varlen_values(const Checker& check, const AttentionArgs& a, const AttentionParams& p) {
  const bool paged = p.block_table != nullptr;
  check_cu_seqlens(check, p.cu_seqlens_q, "cu_seqlens_q", p.batch, p.total_q, p.seqlen_q);
  if (!paged || p.seqused_k == nullptr) {
    check_cu_seqlens(check, p.cu_seqlens_k, "cu_seqlens_k", p.batch, paged ? -1 : p.total_k, p.seqlen_k);
  }
  check_lengths(check, p.seqused_k, "seqused_k", p.batch, p.seqlen_k);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.seqused_q != nullptr) {
      const int64_t rows = int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b];
      check(p.seqused_q[b] >= 0 && p.seqused_q[b] <= rows, "seqused_q[", b, "] is ", p.seqused_q[b],
            ", cu_seqlens_q allots ", rows);
    }
    if (p.seqused_k != nullptr && !paged) {
      const int64_t rows = int64_t{p.cu_seqlens_k[b + 1]} - p.cu_seqlens_k[b];
      check(p.seqused_k[b] <= rows, "seqused_k[", b, "] is ", p.seqused_k[b], ", cu_seqlens_k allots ", rows);
    }
    if (paged) {
      check_pages(check, a, p, b,
                  p.seqused_k != nullptr ? p.seqused_k[b] : int64_t{p.cu_seqlens_k[b + 1]} - p.cu_seqlens_k[b]);
    }
  }
}

void check_cache_values(const Checker& check, const AttentionArgs& a, const AttentionParams& p) {
  if (p.cu_seqlens_q != nullptr) {
    check_cu_seqlens(check, p.cu_seqlens_q, "cu_seqlens_q", p.batch, p.total_q, p.seqlen_q);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t queries = p.cu_seqlens_q != nullptr ? int64_t{p.cu_seqlens_q[b + 1]} - p.cu_seqlens_q[b] : p.seqlen_q;
    const int64_t length = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.seqlen_k;
    const int64_t added = p.k_new == nullptr ? 0 : p.cu_seqlens_q != nullptr ? queries : p.seqlen_new;
    check(length >= 0, "cache_seqlens[", b, "] is ", length, ", expected at least 0");
    check(length + added <= p.seqlen_k, "row ", b, " of the cache has ", length, " keys and gets ", added,
          " more, its capacity is ", p.seqlen_k);
    if (p.cache_leftpad != nullptr) {
      check(p.cache_leftpad[b] >= 0 && p.cache_leftpad[b] <= length + added, "cache_leftpad[", b, "] is ",
            p.cache_leftpad[b], ", the row has ", length + added, " keys");
    }
    if (p.cache_batch_idx != nullptr) {
      check(p.cache_batch_idx[b] >= 0 && p.cache_batch_idx[b] < a.k.size(0), "cache_batch_idx[", b, "] is ",
            p.cache_batch_idx[b], ", k_cache has ", a.k.size(0), " rows");
    }
    if (p.block_table != nullptr) check_pages(check, a, p, b, length + added);
    if (p.rotary_cos != nullptr) {
      const bool local = p.causal || p.window_left >= 0 || p.window_right >= 0;
      const int64_t positions = length + std::max(added, local ? queries : std::min<int64_t>(queries, 1));
      check(positions <= p.rotary_positions, "rotary_cos has ", p.rotary_positions, " positions, row ", b, " needs ",
            positions);
    }
  }
}

}  // namespace vivace
