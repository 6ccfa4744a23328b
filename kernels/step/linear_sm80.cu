// Launches linear_sm80.cuh.
#include "kernels/common/vector.cuh"
#include "kernels/step/linear_launch.h"
#include "kernels/step/linear_sm80.cuh"

namespace vivace {
namespace {

/// Features of a tile: 16 where there are few, so that many multiprocessors have one; 64 where an epilogue wants whole
/// heads.
template <Matrix kMatrix>
constexpr int kWidthOf = kMatrix == Matrix::kOut || kMatrix == Matrix::kDown ? kSquareWidthSm80 : 64;

template <typename T, Matrix kMatrix, int kN>
cudaError_t launch(const LinearArgs& args, bool dependent, cudaStream_t stream) {
  constexpr int kWidth = kWidthOf<kMatrix>;
  using Tile = sm80::LinearTile<kWidth, kN>;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.rows, kN)), static_cast<unsigned>(ceil_div(args.features, kWidth)));
  return launch_linked(sm80::linear_kernel<T, kMatrix, kWidth, kN>, grid, sm80::kLinearThreads, Tile::kSmemBytes, 1,
                       dependent, stream, args);
}

/// The largest tile that leaves nearly every multiprocessor one; a smaller one reads the weights more often, mostly from L2.
template <typename T, Matrix kMatrix>
cudaError_t launch_rows(const LinearArgs& args, bool dependent, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.features, kWidthOf<kMatrix>);
  const auto fits = [&](int n) {
    return args.rows > n / 2 && 10 * tiles * ceil_div(args.rows, n) >= 9 * args.multiprocessors;
  };
  if (fits(32)) return launch<T, kMatrix, 32>(args, dependent, stream);
  if (fits(16)) return launch<T, kMatrix, 16>(args, dependent, stream);
  return launch<T, kMatrix, 8>(args, dependent, stream);
}

template <typename T>
cudaError_t launch_matrix(Matrix matrix, const LinearArgs& args, bool dependent, cudaStream_t stream) {
  switch (matrix) {
    case Matrix::kQkv: return launch_rows<T, Matrix::kQkv>(args, dependent, stream);
    case Matrix::kOut: return launch_rows<T, Matrix::kOut>(args, dependent, stream);
    case Matrix::kGateUp: return launch_rows<T, Matrix::kGateUp>(args, dependent, stream);
    case Matrix::kDown: return launch_rows<T, Matrix::kDown>(args, dependent, stream);
    case Matrix::kHead: return launch_rows<T, Matrix::kHead>(args, dependent, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace

cudaError_t linear_sm80(Matrix matrix, DType dtype, const LinearArgs& args, bool dependent, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch_matrix<__nv_bfloat16>(matrix, args, dependent, stream);
  if (dtype == DType::kFloat16) return launch_matrix<__half>(matrix, args, dependent, stream);
  return cudaErrorNotSupported;
}

}  // namespace vivace
