// rotary_embedding and rotary_embedding_.
#include "csrc/rotary.h"

#include "torch_ext/tensors.h"

namespace vivace {
namespace {

Tensor rotary_embedding(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                        bool interleaved) {
  const TensorView vx = view(x, "x");
  RotaryCall call = check_rotary(vx, view(cos, "cos"), view(sin, "sin"), view(positions, "positions"), interleaved, false);
  Tensor out = empty_like(vx);
  set_rotary_output(call, data_of(out));
  const DeviceScope scope(vx);
  run_rotary(call, vx.device, vx.device_index, scope.stream());
  return out;
}

void rotary_embedding_(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
                       bool interleaved) {
  const TensorView vx = mutable_view(x, "x");
  const RotaryCall call =
      check_rotary(vx, view(cos, "cos"), view(sin, "sin"), view(positions, "positions"), interleaved, true);
  const DeviceScope scope(vx);
  run_rotary(call, vx.device, vx.device_index, scope.stream());
}

void register_impls(torch::stable::detail::StableLibrary& m) {
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("rotary_embedding_", TORCH_BOX(&rotary_embedding_));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vivace, m) {
  m.def("rotary_embedding(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False) -> Tensor");
  m.def("rotary_embedding_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions=None, bool interleaved=False) -> ()");
}

VIVACE_REGISTER_IMPLS(register_impls)

}  // namespace vivace
