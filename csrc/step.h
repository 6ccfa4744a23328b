#pragma once

#include <cstdint>
#include <vector>

#include "csrc/tensor_view.h"
#include "kernels/step/step.h"

namespace vivace {

/// Arguments as in the schema of decode_step.
struct StepArgs {
  TensorView tokens, positions, row_request;
  TensorView speech_emb, speech_pos_emb, input_norm, qkv, out, post_norm, gate_up, down, norm, head;
  TensorView rotary_cos, rotary_sin, k_cache, v_cache, cache_seqlens, cache_batch_idx, workspace;
  double eps = 1e-5;
  TensorView probes;  // not defined: none
  std::vector<int64_t> probe_layers, probe_heads;
};

/// Which implementation runs a step on CUDA.
enum class StepFamily : int64_t { kAuto, kPersistent, kChain, kSplit, kMesh };

/// The caller sets logits.
StepParams check_step(const StepArgs& args);
void run_step(const StepParams& params, StepFamily family, DeviceType device, int device_index, void* stream);

/// Bytes of the workspace of a step of up to `rows` rows: 0 on the CPU, -1 where no CUDA kernel takes the shape.
int64_t step_workspace(const TensorView& qkv, const TensorView& down, const TensorView& head, const TensorView& k_cache,
                       int64_t rows, bool probes, StepFamily family);

/// What this thread's last step ran on: "cpu", "step_persistent", "step_chain", "step_split", "step_mesh"; "" before the
/// first.
const char* last_step_kernel();

}  // namespace vivace
