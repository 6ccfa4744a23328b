#include "kernels/attention/forward_sm80_launch.cuh"

namespace vivace::sm80 {
template cudaError_t launch_forward<192>(ForwardArgs&, bool, int64_t, Sm, cudaStream_t);
}  // namespace vivace::sm80
