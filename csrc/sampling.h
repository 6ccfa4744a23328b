#pragma once

#include "csrc/tensor_view.h"
#include "kernels/sampling/sample.h"

namespace vivace {

/// Arguments as in the schemas; `seed` and `step` are not defined for sampling_probs, what follows them for sample_advance
/// alone.
struct SampleArgs {
  TensorView logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k, seed, step;
  TensorView tokens, positions, cache_seqlens, advance, history, turn;
  int64_t last_position = 0;
};

/// `op` is "sample", "sampling_probs" or "sample_advance". The caller of the first two sets tokens or probs.
SampleParams check_sample(const char* op, const SampleArgs& args);
void run_sample(const char* op, const SampleParams& params, DeviceType device, int device_index, void* stream);

}  // namespace vivace
