// Checks of the values in index tensors, possible where they can be read: on the CPU.
#pragma once

#include "csrc/attention.h"
#include "csrc/check.h"

namespace vivace {

/// cu_seqlens and seqused against the tensors, block_table against the pages.
void check_varlen_values(const Checker& check, const AttentionArgs& args, const AttentionParams& params);

/// cache_seqlens, cache_leftpad and cache_batch_idx against the cache: what is appended must fit, before anything is
/// written.
void check_cache_values(const Checker& check, const AttentionArgs& args, const AttentionParams& params);

}  // namespace vivace
