#include "kernels/attention/forward_sm90_launch.cuh"

namespace vivace::sm90 {
template cudaError_t launch_dense<128, true>(const AttentionParams&, cudaStream_t);
}  // namespace vivace::sm90
