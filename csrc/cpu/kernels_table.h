// The table of one instruction set; included once by each kernels_*.cpp, which names the set.
#include "csrc/cpu/attention_backward_kernel.h"
#include "csrc/cpu/attention_block_kernel.h"
#include "csrc/cpu/attention_chunk_kernel.h"
#include "csrc/cpu/elementwise_kernel.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/linear_kernel.h"

namespace vivace::cpu {

namespace VIVACE_ISA {
namespace {
template <typename T>
constexpr TypedKernels typed_kernels() {
  return {attention_block<T>, attention_chunk<T>, attention_backward_head<T>,
          rms_norm_row<T>,    silu_gate_row<T>,   rotary_token<T>,
          linear<T, T>,       linear<T, float>};
}
}  // namespace
}  // namespace VIVACE_ISA

extern const Kernels VIVACE_ISA_TABLE;
const Kernels VIVACE_ISA_TABLE = {VIVACE_ISA_NAME,
                                  VIVACE_ISA::kLanes,
                                  VIVACE_ISA::typed_kernels<float>(),
                                  VIVACE_ISA::typed_kernels<BFloat16>(),
                                  VIVACE_ISA::typed_kernels<Float16>(),
                                  VIVACE_ISA::exp_row};

}  // namespace vivace::cpu
