// CPU implementations of the operators: the golden reference that every kernel is held against. They take the same structs
// as the CUDA kernels, compute in fp32 (in double for float64, which is there for gradient checks), and run on
// csrc/parallel.h's threads with the widest vectors the machine has.
#pragma once

#include "kernels/activation/silu_gate.h"
#include "kernels/attention/backward_params.h"
#include "kernels/attention/params.h"
#include "kernels/norm/rms_norm.h"
#include "kernels/rotary/rotary.h"
#include "kernels/sampling/sample.h"
#include "kernels/step/step.h"

namespace vivace::cpu {

/// The whole call: rotary, append, attention, probe. Needs no workspace.
void attention_forward(const AttentionParams& params);
/// Dense and variable length; the same bits for the same call on any number of threads.
void attention_backward(const AttentionBackwardParams& params);
void rms_norm(const RmsNormParams& params);
void rotary(const RotaryParams& params);
void silu_gate(const SiluGateParams& params);
void sample(const SampleParams& params);
void decode_step(const StepParams& params);

}  // namespace vivace::cpu
