#include "csrc/activation.h"

#include "csrc/arch.h"
#include "csrc/check.h"
#include "csrc/cpu/ops.h"

#ifdef VIVACE_WITH_CUDA
#include "kernels/activation/silu_gate_launch.h"
#endif

namespace vivace {

SiluGateParams check_silu_gate(const TensorView& gate_up) {
  const Checker check("silu_gate", gate_up, "gate_up");
  check(gate_up.dims >= 1 && gate_up.size(-1) % 2 == 0, "gate_up has shape ", gate_up,
        ", expected (..., 2 * width): gate and up side by side");
  check.floating(gate_up, "gate_up");
  check.last_dim_contiguous(gate_up, "gate_up");
  const Rows rows = rows_of(gate_up);
  check(rows.even, "the rows of gate_up are not evenly spaced (gate_up: ", gate_up, "); call gate_up.contiguous()");
  SiluGateParams p;
  p.dtype = gate_up.dtype;
  p.x = gate_up.data;
  p.rows = rows.count;
  p.width = gate_up.size(-1) / 2;
  p.x_stride = rows.stride;
  return p;
}

void run_silu_gate(const SiluGateParams& p, DeviceType device, int device_index, [[maybe_unused]] void* stream) {
  check_device("silu_gate", device, device_index);
  if (p.rows == 0 || p.width == 0) return;
  if (device == DeviceType::kCpu) return cpu::silu_gate(p);
#ifdef VIVACE_WITH_CUDA
  check_cuda("silu_gate", "silu_gate_cuda", silu_gate_cuda(p, static_cast<cudaStream_t>(stream)));
#endif
}

}  // namespace vivace
