// Launches linear_sm90.cuh.
#include <algorithm>

#include "kernels/common/tensor_map.h"
#include "kernels/common/vector.cuh"
#include "kernels/step/linear_launch.h"
#include "kernels/step/linear_sm90.cuh"

namespace vivace {
namespace {

/// Tiles of 64 features of a CTA, and CTAs that share the columns; fixed for a matrix, so that sums do not depend on rows.
/// KiB of shared memory to 64 rows and beyond. 113 lets two CTAs run beside each other: one loads weights while the other
/// computes; and clusters of 8 want it, since 15 of them fit on 132 multiprocessors where CTAs do not share one, not 16.
template <int kTiles_, int kSplit_, int kSmall_, int kLarge_>
struct Shares {
  static constexpr int kTiles = kTiles_, kSplit = kSplit_, kSmall = kSmall_, kLarge = kLarge_;
};
template <Matrix kMatrix>
struct SharesOf;
template <>
struct SharesOf<Matrix::kQkv> : Shares<1, 4, 113, 113> {};
template <>
struct SharesOf<Matrix::kOut> : Shares<1, 4, 113, 113> {};
template <>
struct SharesOf<Matrix::kGateUp> : Shares<2, 2, 113, 224> {};
template <>
struct SharesOf<Matrix::kDown> : Shares<1, 8, 113, 113> {};
template <>
struct SharesOf<Matrix::kHead> : Shares<2, 2, 150, 226> {};

template <typename T, Matrix kMatrix, int kN>
cudaError_t launch(const LinearArgs& args, const CUtensorMap& weight, const CUtensorMap& x, bool dependent,
                   cudaStream_t stream) {
  using S = SharesOf<kMatrix>;
  using Least = sm90::LinearTraits<T, kMatrix, kN, S::kTiles, S::kSplit, 1>;
  constexpr int kBehind = sizeof(sm90::LinearSmem<Least>) + 256;  // with more barriers
  constexpr int kBudget = (kN <= 64 ? S::kSmall : S::kLarge) * 1024;
  constexpr int kStages = std::min(8, (kBudget - kBehind) / Least::kStageBytes);
  using Traits = sm90::LinearTraits<T, kMatrix, kN, S::kTiles, S::kSplit, kStages>;
  static_assert(kStages >= 2 && sizeof(sm90::LinearSmem<Traits>) <= kBehind);
  const int stages = std::min(kStages, args.k / 64 / S::kSplit);
  const size_t bytes = static_cast<size_t>(stages) * Traits::kStageBytes + sizeof(sm90::LinearSmem<Traits>);
  const dim3 grid(S::kSplit, static_cast<unsigned>(ceil_div(args.features, S::kTiles * 64)),
                  static_cast<unsigned>(ceil_div(args.rows, kN)));
  return launch_linked(sm90::linear_kernel<Traits>, grid, Traits::kThreads, bytes, S::kSplit, dependent, stream, args,
                       weight, x);
}

template <typename T, Matrix kMatrix>
cudaError_t launch_rows(const LinearArgs& args, const CUtensorMap& weight, const CUtensorMap& x, bool dependent,
                        cudaStream_t stream) {
  switch (linear_sm90_rows(kMatrix, args.rows)) {
    case 16: return launch<T, kMatrix, 16>(args, weight, x, dependent, stream);
    case 32: return launch<T, kMatrix, 32>(args, weight, x, dependent, stream);
    case 48: return launch<T, kMatrix, 48>(args, weight, x, dependent, stream);
    case 64: return launch<T, kMatrix, 64>(args, weight, x, dependent, stream);
    case 96: return launch<T, kMatrix, 96>(args, weight, x, dependent, stream);
    default: return launch<T, kMatrix, 128>(args, weight, x, dependent, stream);
  }
}

template <typename T>
cudaError_t launch_matrix(Matrix matrix, const LinearArgs& args, const CUtensorMap& weight, const CUtensorMap& x,
                          bool dependent, cudaStream_t stream) {
  switch (matrix) {
    case Matrix::kQkv: return launch_rows<T, Matrix::kQkv>(args, weight, x, dependent, stream);
    case Matrix::kOut: return launch_rows<T, Matrix::kOut>(args, weight, x, dependent, stream);
    case Matrix::kGateUp: return launch_rows<T, Matrix::kGateUp>(args, weight, x, dependent, stream);
    case Matrix::kDown: return launch_rows<T, Matrix::kDown>(args, weight, x, dependent, stream);
    case Matrix::kHead: return launch_rows<T, Matrix::kHead>(args, weight, x, dependent, stream);
  }
  return cudaErrorNotSupported;
}

template <Matrix kMatrix>
bool supports(int64_t features, int64_t k) {
  using S = SharesOf<kMatrix>;
  return k % (64 * S::kSplit) == 0 && (kMatrix == Matrix::kHead || features % (64 * S::kTiles) == 0);
}

}  // namespace

int linear_sm90_rows(Matrix matrix, int64_t rows) {
  for (const int n : {16, 32, 48, 64}) {
    if (rows <= n) return n;
  }
  if (matrix == Matrix::kOut) return 64;  // twice as many CTAs of half the exchange
  return rows <= 96 ? 96 : 128;
}

bool linear_sm90_supports(Matrix matrix, int64_t features, int64_t k) {
  switch (matrix) {
    case Matrix::kQkv: return supports<Matrix::kQkv>(features, k);
    case Matrix::kOut: return supports<Matrix::kOut>(features, k);
    case Matrix::kGateUp: return supports<Matrix::kGateUp>(features, k);
    case Matrix::kDown: return supports<Matrix::kDown>(features, k);
    case Matrix::kHead: return supports<Matrix::kHead>(features, k);
  }
  return false;
}

bool linear_sm90_map(CUtensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns, int box_rows) {
  if (sm90::encode_tiled() == nullptr || !is_aligned_16(data)) return false;
  return sm90::encode_tensor_map(map, dtype, data, {columns, rows}, {columns * 2}, {64, box_rows});
}

cudaError_t linear_sm90(Matrix matrix, DType dtype, const LinearArgs& args, const CUtensorMap& weight, const CUtensorMap& x,
                        bool dependent, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch_matrix<__nv_bfloat16>(matrix, args, weight, x, dependent, stream);
  if (dtype == DType::kFloat16) return launch_matrix<__half>(matrix, args, weight, x, dependent, stream);
  return cudaErrorNotSupported;
}

}  // namespace vivace
