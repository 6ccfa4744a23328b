// float64 attention, plain loops in double: for gradient checks, not for speed.
#pragma once

#include <vector>

#include "csrc/cpu/sequence.h"
#include "kernels/attention/backward_params.h"

namespace vivace::cpu {

void attention_forward_double(const AttentionParams& params, const std::vector<Sequence>& sequences);
void attention_backward_double(const AttentionBackwardParams& params, const std::vector<Sequence>& sequences);

}  // namespace vivace::cpu
