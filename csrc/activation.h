#pragma once

#include "csrc/tensor_view.h"
#include "kernels/activation/silu_gate.h"

namespace vivace {

/// gate_up (..., 2 * width), its rows evenly spaced; out (..., width) is set by the caller.
SiluGateParams check_silu_gate(const TensorView& gate_up);
void run_silu_gate(const SiluGateParams& params, DeviceType device, int device_index, void* stream);

}  // namespace vivace
