#include "kernels/attention/forward_sm90_launch.cuh"

namespace vivace::sm90 {
template cudaError_t launch_forward<256>(const AttentionParams&, cudaStream_t);
}  // namespace vivace::sm90
