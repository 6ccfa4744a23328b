#pragma once

#include <vector>

#include "csrc/cpu/sequence.h"

namespace vivace::cpu {

/// Writes params.probe from q (rotated already), the keys and lse.
void attention_probe(const AttentionParams& params, const std::vector<Sequence>& sequences);

}  // namespace vivace::cpu
