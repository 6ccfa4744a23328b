// x @ weight^T for few rows: every weight is read once for each tile of rows, in the order it lies in memory.
#pragma once

#include "csrc/cpu/vector.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

constexpr int kLinearRows = 4, kLinearOutputs = 2;

/// kRows x kOutputs dot products. Each is summed over the lanes of one vector in the order of depth, whatever the tile, so
/// that a row's result does not depend on its neighbours.
template <int kRows, int kOutputs, typename T, typename Out>
VIVACE_INLINE void linear_tile(const T* x, int64_t x_stride, const T* weight, Out* out, int64_t out_stride, int64_t depth) {
  Vec sum[kRows][kOutputs] = {};
  const auto step = [&](int64_t d, auto load_at) {
    Vec w[kOutputs];
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o) w[o] = load_at(weight + o * depth + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec a = load_at(x + r * x_stride + d);
#pragma GCC unroll 2
      for (int o = 0; o < kOutputs; ++o) sum[r][o] += a * w[o];
    }
  };
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) step(d, [](const T* p) { return load(p); });
  if (d < depth) step(d, [rest = depth - d](const T* p) { return load_first(p, rest); });
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOutputs; ++o) out[r * out_stride + o] = from_float<Out>(sum_of(sum[r][o]));
  }
}

template <int kRows, typename T, typename Out>
VIVACE_INLINE void linear_rows(const T* x, int64_t x_stride, const T* weight, Out* out, int64_t out_stride, int64_t outputs,
                               int64_t depth) {
  int64_t o = 0;
  for (; o + kLinearOutputs <= outputs; o += kLinearOutputs) {
    linear_tile<kRows, kLinearOutputs>(x, x_stride, weight + o * depth, out + o, out_stride, depth);
  }
  if (o < outputs) linear_tile<kRows, 1>(x, x_stride, weight + o * depth, out + o, out_stride, depth);
}

/// out (rows, outputs) = x (rows, depth) @ weight (outputs, depth)^T; sums in fp32, rounded once.
template <typename T, typename Out>
void linear(const void* x_rows, int64_t x_stride, const void* weight_rows, void* out_rows, int64_t out_stride, int64_t rows,
            int64_t outputs, int64_t depth) {
  // The tile of outputs stays in the first cache while all rows pass over it.
  constexpr int64_t kBlock = 16;
  for (int64_t o = 0; o < outputs; o += kBlock) {
    const int64_t n = min64(kBlock, outputs - o);
    const T* weight = static_cast<const T*>(weight_rows) + o * depth;
    int64_t r = 0;
    const auto tile = [&](auto count) {
      linear_rows<decltype(count)::value>(static_cast<const T*>(x_rows) + r * x_stride, x_stride, weight,
                                          static_cast<Out*>(out_rows) + r * out_stride + o, out_stride, n, depth);
      r += decltype(count)::value;
    };
    while (r + kLinearRows <= rows) tile(std::integral_constant<int, kLinearRows>());
    if (r + 2 <= rows) tile(std::integral_constant<int, 2>());
    if (r < rows) tile(std::integral_constant<int, 1>());
  }
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
