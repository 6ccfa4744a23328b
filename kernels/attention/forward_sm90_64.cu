#include "kernels/attention/forward_sm90_launch.cuh"

namespace vivace::sm90 {
template cudaError_t launch_dense<64, false>(const AttentionParams&, cudaStream_t);
template cudaError_t launch_ragged<64>(const AttentionParams&, cudaStream_t);
}  // namespace vivace::sm90
