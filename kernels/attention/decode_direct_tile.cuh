// What one warp of decode_direct computes of a tile of keys, which it holds in
// registers just as they came from memory: each 16-byte chunk of a row is an
// operand of mma.m16n8k16 as it is. Products do not care for the order of the
// dims or keys that they sum over, so the orders are what the chunks make them.
//
//   S^T (keys x query rows) = K Q^T. Wide, to 8 query rows: rows r and r + 8 of
//   A are two keys, 4 lanes hold 64 bytes of one. Narrow, to 4: 8 lanes hold a
//   key's 128 bytes, a memory line, and the four words of a chunk (8 dims) are
//   rows r and r + 8 of A, thus quarters of a line, which meet different columns
//   of B: those of one query row are words 0 and 2, or 1 and 3, of the chunks of
//   one half of a line. Two elements of a product are of use to a lane, or none;
//   two products, one with the halves of its lines swapped, and two sets of
//   columns make one score a lane. Few, to 2: with one set.
//
//   O^T (dims x query rows) += V^T P^T: a lane has the same chunk of 4 keys;
//   halves of the words of two keys are paired, so that rows r and r + 8 of A
//   are neighbouring dims.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention/softmax.cuh"
#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"

namespace vivace {

enum class DirectForm { kFew, kNarrow, kWide };

/// Keys [16 g, 16 g + 16) are group g. A lane has chunk lane / 4 + 8 i of 4 values of it. Of the keys it has, wide, chunks
/// lane % 4 + 4 i of two; else of the keys lane / 8 + {0, 4, 8, 12} chunk lane % 8 of each line, its bit 2 flipped for the
/// second and the last.
template <typename T, int kDim, int kGroups_, DirectForm kForm, bool kStream>
struct DirectTile {
  static constexpr int kGroups = kGroups_;
  static constexpr bool kWide = kForm == DirectForm::kWide, kFew = kForm == DirectForm::kFew;
  static constexpr int kKeys = 16 * kGroups;
  static constexpr int kChunks = kDim / 32, kLines = kDim / 64;  // of a key: in a lane of wide, in memory
  static constexpr int kColumns = kWide ? 2 : 1;                 // query rows of a lane
  static constexpr int kSets = kForm == DirectForm::kNarrow ? 2 : 1;
  using Scores = float[kGroups][2][kColumns];  // of key score_row(g, e)

  uint4 k[kGroups][2][kChunks];
  uint4 v[kGroups][4][kLines];

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  /// A lane's first chunk of a key.
  static __device__ __forceinline__ int key_chunk() { return lane() % (kWide ? 4 : 8); }
  static __device__ __forceinline__ int score_row(int g, int e) {
    if constexpr (kWide) return 16 * g + 8 * e + lane() / 4;
    const int second = kFew ? lane() ^ lane() / 4 : lane() / 4;
    return 16 * g + 8 * e + 4 * (second & 1) + lane() / 8;
  }
  static __device__ __forceinline__ int value_row(int g, int e) {
    const int column = lane() % 4;
    return 16 * g + 4 * (e & 2) + (kWide ? 2 * column + (e & 1) : column + 4 * (e & 1));
  }
  /// Query row of column j of a lane; none: 8.
  static __device__ __forceinline__ int query_row(int j) {
    const int column = lane() % 4;
    if constexpr (kWide) return 2 * column + j;
    if constexpr (kFew) return column % 2 == 0 ? column / 2 : 8;
    return column / 2 + 2 * (column % 2);
  }

  /// ld.global.v4.b32 past L1. With L1::no_allocate L2, too, lets go of the
  /// lines first: 5 % faster where nothing can stay in it, a third slower where
  /// all could.
  static __device__ __forceinline__ uint4 load(const char* from) {
    uint4 x;
    if constexpr (kStream) {
      asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "l"(from));
    } else {
      asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    }
    return x;
  }

  /// Rows of 8 keys; the same chunk of 4 values a lane. `rows(row of the tile)`
  /// is where this lane's first chunk of it lies.
  template <typename Rows>
  __device__ __forceinline__ void load_keys(int g, int e, const Rows& rows) {
    if constexpr (kWide) {
      const char* const row = rows(16 * g + 8 * e + lane() / 4);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) k[g][e][i] = load(row + 64 * i);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char* row = rows(16 * g + 8 * e + 4 * i + lane() / 8);
        if (i == 1) row += (lane() & 4) == 0 ? 64 : -64;
#pragma unroll
        for (int l = 0; l < kLines; ++l) k[g][e][i * kLines + l] = load(row + 128 * l);
      }
    }
  }
  template <typename Rows>
  __device__ __forceinline__ void load_values(int g, int i, const Rows& rows) {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[g][e][i] = load(rows(value_row(g, e)) + 128 * i);
  }

  template <typename Rows>
  __device__ __forceinline__ void load_keys(const Rows& rows) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) load_keys(g, e, rows);
    }
  }
  template <typename Rows>
  __device__ __forceinline__ void load_values(const Rows& rows) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i) load_values(g, i, rows);
    }
  }

  /// Query rows as the B operand.
  struct Queries {
    uint4 chunks[kSets][kChunks];
    uint2 words[kSets][kLines];

    /// Of the query row that this lane's column of set `p` belongs to.
    static __device__ __forceinline__ int row(int p) { return kWide ? lane() / 4 : lane() / 16 + 2 * p; }
    /// A lane's first chunk of it.
    static __device__ __forceinline__ int chunk(int p) { return lane() % 4 + (kWide ? 0 : 4 * ((lane() / 8 ^ p) & 1)); }
    /// from: that chunk; null: zeros.
    __device__ __forceinline__ void load(int p, const char* from) {
#pragma unroll
      for (int i = 0; i < (kWide ? kChunks : kLines); ++i) {
        chunks[p][i] = from == nullptr ? make_uint4(0, 0, 0, 0) : DirectTile::load(from + (kWide ? 64 : 128) * i);
      }
    }
    /// When they are there.
    __device__ __forceinline__ void arrange() {
      const bool even = lane() / 4 % 2 == 0;
#pragma unroll
      for (int p = 0; p < kSets; ++p) {
#pragma unroll
        for (int l = 0; l < kLines; ++l) {
          const uint4& x = chunks[p][l];
          words[p][l] = even ? make_uint2(x.x, x.z) : make_uint2(x.y, x.w);
        }
      }
    }
  };

  /// Times `scale`.
  __device__ __forceinline__ void scores(Scores& s, const Queries& q, float scale) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kWide) {
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          const uint4 &low = k[g][0][i], &high = k[g][1][i], &b = q.chunks[0][i];
          const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
          ptx::mma_m16n8k16<T>(x, first, b.x, b.y);
          ptx::mma_m16n8k16<T>(x, second, b.z, b.w);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[g][e][0] = x[2 * e] * scale;
          s[g][e][kColumns - 1] = x[2 * e + 1] * scale;
        }
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) s[g][e][0] = narrow_scores(g, e, q) * scale;
      }
    }
  }

  /// Element (query row 2 p + column / 2) of product i, set p, is of use where bit 0 of column, key and i say the same half
  /// of a line; its other half is in lane ^ 5.
  __device__ __forceinline__ float narrow_scores(int g, int e, const Queries& q) const {
    float half[kSets][2];
#pragma unroll
    for (int p = 0; p < kSets; ++p) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int l = 0; l < kLines; ++l) {
          const uint4& chunk = k[g][e][i * kLines + l];
          const uint32_t a[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
          ptx::mma_m16n8k16<T>(x, a, q.words[p][l].x, q.words[p][l].y);
        }
        half[p][i] = x[0] + x[3];
      }
    }
    const bool odd_column = (lane() & 1) != 0, odd_key = (lane() & 4) != 0;
    if constexpr (kFew) {
      const float own = odd_column != odd_key ? half[0][1] : half[0][0];
      return own + __shfl_xor_sync(~0u, own, 5);
    } else {
      // Even columns: row column / 2, set 0. Odd ones: 2 + column / 2, set 1. Of product 1 where the key is odd.
      const float own = odd_column ? (odd_key ? half[1][1] : half[1][0]) : (odd_key ? half[0][1] : half[0][0]);
      const float other = odd_column ? (odd_key ? half[0][0] : half[0][1]) : (odd_key ? half[1][0] : half[1][1]);
      return own + __shfl_xor_sync(~0u, other, 5);
    }
  }

  /// Rows of the tile from `end` on do not exist; what was loaded in their
  /// place is cleared.
  __device__ __forceinline__ void hide(Scores& s, int end) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (score_row(g, e) >= end) s[g][e][j] = -INFINITY;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < kDim / 64; ++i) {
          if (value_row(g, e) >= end) v[g][e][i] = make_uint4(0, 0, 0, 0);
        }
      }
    }
  }
};

/// Online softmax over the keys that a warp has seen, in powers of two. A lane
/// holds, of its query rows, dims 8 (lane / 4 + 8 i) + {0 ... 7}.
template <typename T, int kDim, typename Tile>
struct DirectState {
  static constexpr int kColumns = Tile::kColumns, kGroups = Tile::kGroups;
  float max[kColumns], sum[kColumns];  // the maximum is the same in all lanes of
                                       // a row, the sum is this lane's part
  float out[kDim / 16][4];             // [4 i + w][2 h + j]: dim 8 (lane / 4 + 8 i) + 2 w +
                                       // h, column j

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      max[j] = -INFINITY;
      sum[j] = 0.0f;
    }
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) out[m][0] = out[m][1] = out[m][2] = out[m][3] = 0.0f;
  }

  /// Scores become probabilities, as far as the keys seen until now tell.
  __device__ __forceinline__ void weigh(typename Tile::Scores& s) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float largest = max[j];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) largest = fmaxf(largest, fmaxf(s[g][0][j], s[g][1][j]));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
      }
      const float offset = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet: not -inf - -inf
      const float rescale = ptx::exp2_approx(max[j] - offset);
      max[j] = largest;
      float part = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[g][e][j] = ptx::exp2_approx(s[g][e][j] - offset);
          part += s[g][e][j];
        }
      }
      sum[j] = fmaf(sum[j], rescale, part);
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        out[m][j] *= rescale;
        out[m][2 + j] *= rescale;
      }
    }
  }

  /// Adds the values, p of each.
  __device__ __forceinline__ void add(const typename Tile::Scores& p, const Tile& tile) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t b[2];  // p as the B operand: keys are its rows
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        b[e] = ptx::movmatrix_trans(pack2<T>(p[g][e][0], kColumns == 1 ? 0.0f : p[g][e][kColumns - 1]));
      }
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i) {
        const auto pairs = [&](int w, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
          const uint32_t a[4] = {__byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410),
                                 __byte_perm(x2, x3, 0x7632)};
          ptx::mma_m16n8k16<T>(out[4 * i + w], a, b[0], b[1]);
        };
        const uint4 &v0 = tile.v[g][0][i], &v1 = tile.v[g][1][i], &v2 = tile.v[g][2][i], &v3 = tile.v[g][3][i];
        pairs(0, v0.x, v1.x, v2.x, v3.x);
        pairs(1, v0.y, v1.y, v2.y, v3.y);
        pairs(2, v0.z, v1.z, v2.z, v3.z);
        pairs(3, v0.w, v1.w, v2.w, v3.w);
      }
    }
  }

  /// Writes the state to shared memory: rows of outputs `pitch` floats apart,
  /// and {maximum, sum} of each.
  __device__ __forceinline__ void store(float* to, int pitch, float2* stats, int rows) const {
    const int quad = static_cast<int>(threadIdx.x % 32) / 4;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float total = sum[j];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
      const int r = Tile::query_row(j);
      if (r >= rows) continue;
      if (quad == 0) stats[r] = make_float2(max[j], total);
#pragma unroll
      for (int i = 0; i < kDim / 64; ++i) {
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          const float(&a)[4] = out[4 * i + w], (&b)[4] = out[4 * i + w + 1];
          *reinterpret_cast<float4*>(to + r * pitch + 8 * (quad + 8 * i) + 2 * w) =
              make_float4(a[j], a[2 + j], b[j], b[2 + j]);
        }
      }
    }
  }
};

}  // namespace vivace
