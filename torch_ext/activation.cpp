// silu_gate.
#include "csrc/activation.h"

#include "torch_ext/tensors.h"

namespace vivace {
namespace {

Tensor silu_gate(const Tensor& gate_up) {
  const TensorView x = view(gate_up, "gate_up");
  SiluGateParams p = check_silu_gate(x);
  TensorView half = x;
  half.sizes[half.dims - 1] = p.width;
  Tensor out = empty_like(half);
  p.out = data_of(out);
  const DeviceScope scope(x);
  run_silu_gate(p, x.device, x.device_index, scope.stream());
  return out;
}

void register_impls(torch::stable::detail::StableLibrary& m) { m.impl("silu_gate", TORCH_BOX(&silu_gate)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) { m.def("silu_gate(Tensor gate_up) -> Tensor"); }

VIVACE_REGISTER_IMPLS(register_impls)

}  // namespace vivace
