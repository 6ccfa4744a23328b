// C (+)= A B for tiles that lie in the first caches, and the packing of keys and values that it reads.
#pragma once

#include "csrc/cpu/vector.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

// Accumulators of a tile: kTileRows * kTileVectors registers of 32 (AVX-512) or 16, the rest for B and one element of A.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

/// One tile: M rows and N vectors of columns. a_row, a_depth: strides of A.
template <int M, int N, bool kAdd>
void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row, float* c,
               int64_t c_row) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = kAdd ? load(c + m * c_row + n * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = broadcast(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] += x * columns[n];
    }
    a += a_depth;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
  }
}

using GemmTile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t);

template <int N, bool kAdd>
VIVACE_INLINE GemmTile gemm_tile_of(int64_t rows) {
  switch (rows) {
    case 1: return gemm_tile<1, N, kAdd>;
    case 2: return gemm_tile<2, N, kAdd>;
    case 3: return gemm_tile<3, N, kAdd>;
    case 4: return gemm_tile<4, N, kAdd>;
    case 5: return gemm_tile<5, N, kAdd>;
    default: return gemm_tile<6, N, kAdd>;
  }
}
template <bool kAdd>
VIVACE_INLINE GemmTile gemm_tile_of(int64_t rows, int64_t vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return gemm_tile_of<4, kAdd>(rows);
    if (vectors == 3) return gemm_tile_of<3, kAdd>(rows);
  }
  return vectors >= 2 ? gemm_tile_of<2, kAdd>(rows) : gemm_tile_of<1, kAdd>(rows);
}

/// C (rows, columns) = or += A (rows, depth) B (depth, columns); columns is rounded up to whole vectors, which B and C must
/// have room for.
template <bool kAdd>
void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
          int64_t b_row, float* c, int64_t c_row) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t n = 0; n < vectors; n += kTileVectors) {
    const int64_t width = min64(kTileVectors, vectors - n);
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t height = min64(kTileRows, rows - m);
      gemm_tile_of<kAdd>(height, width)(depth, a + m * a_row, a_row, a_depth, b + n * kLanes, b_row,
                                        c + m * c_row + n * kLanes, c_row);
    }
  }
}

/// to[0 ... width - 1] = scale * row, then zeros up to padded_width, a multiple of kLanes.
template <typename T>
VIVACE_INLINE void load_row(const T* row, int64_t width, int64_t padded_width, float scale, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(to + d, load(row + d) * scale);
  if (d < width) {
    store(to + d, load_first(row + d, width - d) * scale);
    d += kLanes;
  }
  for (; d < padded_width; d += kLanes) store(to + d, Vec{});
}

/// to[0 ... width - 1] = scale * from, which has room for whole vectors.
template <typename T>
VIVACE_INLINE void store_scaled(const float* from, int64_t width, float scale, T* to) {
  for (int64_t d = 0; d < width; d += kLanes) store_first(to + d, load(from + d) * scale, width - d);
}

/// to (width, columns) = the transposition of `count` rows, row n at base + offsets[n]; columns past count are 0. columns is
/// a multiple of kLanes.
template <typename T>
void pack_transposed(const T* base, const int64_t* offsets, int64_t count, int64_t width, float* to, int64_t columns) {
  for (int64_t n = 0; n < columns; n += kLanes) {
    const int64_t rows = max64(0, min64(kLanes, count - n));
    int64_t d = 0;
    if (rows == kLanes) {
      for (; d + kLanes <= width; d += kLanes) {
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load(base + offsets[n + i] + d);
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (d + i) * columns + n, tile[i]);
      }
    } else {
      for (; d + kLanes <= width; d += kLanes) {
        Vec tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = i < rows ? load(base + offsets[n + i] + d) : Vec{};
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) store(to + (d + i) * columns + n, tile[i]);
      }
    }
    for (; d < width; ++d) {
      for (int64_t i = 0; i < kLanes; ++i) to[d * columns + n + i] = i < rows ? to_float(base[offsets[n + i] + d]) : 0.0f;
    }
  }
}

/// to (count, padded_width) = the rows; returns whether all of them are finite.
template <typename T>
bool pack_rows(const T* base, const int64_t* offsets, int64_t count, int64_t width, int64_t padded_width, float* to) {
  Vec poison{};  // 0 * x is NaN where x is Inf or NaN
  for (int64_t n = 0; n < count; ++n) {
    float* row = to + n * padded_width;
    load_row(base + offsets[n], width, padded_width, 1.0f, row);
    for (int64_t d = 0; d < padded_width; d += kLanes) poison += load(row + d) * 0.0f;
  }
  return sum_of(poison) == 0.0f;
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
