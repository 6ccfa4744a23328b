// What a call with a KV cache does before attention: rotary embedding of q, the append of new keys.
#pragma once

#include <vector>

#include "csrc/cpu/sequence.h"

namespace vivace::cpu {

/// Throws where a row would grow past its capacity or a position lies outside the rotary table. Writes nothing.
void check_cache(const AttentionParams& params, const std::vector<Sequence>& sequences);

/// Rotates the new keys and writes them and the new values into the cache.
void append_to_cache(const AttentionParams& params, const std::vector<Sequence>& sequences);

/// Rotated q, of q's dtype as on CUDA, in `memory`; returns the call with q and its strides replaced.
AttentionParams rotate_queries(const AttentionParams& params, const std::vector<Sequence>& sequences,
                               std::vector<char>& memory);

}  // namespace vivace::cpu
