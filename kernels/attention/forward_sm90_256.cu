#include "kernels/attention/forward_sm90_launch.cuh"

namespace vivace::sm90 {
template cudaError_t launch_dense<256, false>(const AttentionParams&, cudaStream_t);
template cudaError_t launch_dense<256, true>(const AttentionParams&, cudaStream_t);
template cudaError_t launch_ragged<256>(const AttentionParams&, cudaStream_t);
}  // namespace vivace::sm90
