#pragma once

#include "csrc/tensor_view.h"
#include "kernels/sampling/sample.h"

namespace vivace {

/// Arguments as in the schemas; `seed` and `step` are not defined for sampling_probs.
struct SampleArgs {
  TensorView logits, rows, seen, cfg_weight, temperature, repetition_penalty, min_p, top_p, top_k, seed, step;
};

/// `op` is "sample" or "sampling_probs". The caller sets tokens or probs.
SampleParams check_sample(const char* op, const SampleArgs& args);
void run_sample(const char* op, const SampleParams& params, DeviceType device, int device_index, void* stream);

}  // namespace vivace
