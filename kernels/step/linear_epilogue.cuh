// What becomes of a finished tile of a product: shared by the families of the chain's products.
//
// A tile is kWidth rows of the weight matrix times some rows of the step. Its elements are dealt to items: item (row, lane)
// of kWidth / 4 lanes a row holds features 2 * lane + {0, 1} of the tile's first half and of its second. So a rotary pair
// (i, i + 32) of a head lies in one item, and so does a gate and its up projection (a tile of kGateUp is 32 rows of the one,
// then 32 of the other). What the epilogue reads besides is loaded before the product starts.
#pragma once

#include "kernels/common/convert.cuh"
#include "kernels/step/linear.h"
#include "kernels/step/silu.cuh"

namespace vivace {

/// First row of the weight matrix behind row `i` of tile `tile`.
template <Matrix kMatrix, int kWidth>
__device__ __forceinline__ int weight_row_of(const LinearArgs& args, int tile, int i) {
  if constexpr (kMatrix == Matrix::kGateUp) {
    constexpr int kHalf = kWidth / 2;
    return tile * kHalf + (i < kHalf ? i : args.features / 2 + i - kHalf);
  } else {
    return tile * kWidth + i;
  }
}

template <typename T, Matrix kMatrix, int kWidth>
class LinearItem {
 public:
  static constexpr int kLanes = kWidth / 4;
  static constexpr bool kResidual = kMatrix == Matrix::kOut || kMatrix == Matrix::kDown;
  static constexpr bool kNormed = !kResidual;
  static_assert(kResidual || kWidth == 64);

  /// Loads what no kernel of this step writes.
  __device__ __forceinline__ void load_constants(const LinearArgs& args, int row, int tile, int lane) {
    row_ = row;
    if (row >= args.rows) return;
    if constexpr (kResidual) {
      const T* gain = static_cast<const T*>(args.gain) + tile * kWidth + 2 * lane;
      load_pair(gain, b_[0], b_[1]);
      load_pair(gain + kWidth / 2, b_[2], b_[3]);
    } else if constexpr (kMatrix == Matrix::kQkv) {
      cache_row_ = args.cache_batch_idx[row];
      position_ = args.cache_seqlens[row];
      if (tile < args.heads + args.heads_kv) {
        const int64_t last = args.rotary_positions - 1;
        const int64_t at = position_ < 0 ? 0 : position_ < last ? position_ : last;
        load_table(args.rotary_cos, args.rotary_fp32, at * 32 + 2 * lane, b_[0], b_[1]);
        load_table(args.rotary_sin, args.rotary_fp32, at * 32 + 2 * lane, b_[2], b_[3]);
      }
    }
  }

  /// Loads what the kernel before has written.
  __device__ __forceinline__ void load(const LinearArgs& args, int tile, int lane) {
    if (row_ >= args.rows) return;
    if constexpr (kResidual) {
      const float* from = args.residual + int64_t{row_} * args.features + tile * kWidth + 2 * lane;
      const float2 lo = __ldcg(reinterpret_cast<const float2*>(from));
      const float2 hi = __ldcg(reinterpret_cast<const float2*>(from + kWidth / 2));
      a_[0] = lo.x, a_[1] = lo.y, a_[2] = hi.x, a_[3] = hi.y;
    } else {
      const float* from = args.squares + int64_t{row_} * args.square_parts;
      float sum = 0.0f;
      for (int i = lane; i < args.square_parts; i += kLanes) sum += __ldcg(from + i);
      a_[0] = sum;
    }
  }

  /// Makes 1 / rms of the row from what load() has brought. By all lanes of a warp.
  __device__ __forceinline__ void prepare(const LinearArgs& args) {
    if constexpr (kNormed) {
      float sum = row_ < args.rows ? a_[0] : 0.0f;
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      a_[0] = rsqrtf(sum * args.inverse_hidden + args.eps);
    }
  }

  /// Takes features 2 * lane + {0, 1} (v[0], v[1]) and kWidth / 2 further (v[2], v[3]). By all lanes of a warp.
  __device__ __forceinline__ void store(const LinearArgs& args, int tile, int lane, float (&v)[4]) {
    if constexpr (kResidual) {
      store_residual(args, tile, lane, v);
    } else {
      if (row_ >= args.rows) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] *= a_[0];
      if constexpr (kMatrix == Matrix::kQkv) {
        store_qkv(args, tile, lane, v);
      } else if constexpr (kMatrix == Matrix::kGateUp) {
        T* to = static_cast<T*>(args.out) + int64_t{row_} * (args.features / 2) + tile * (kWidth / 2) + 2 * lane;
        store_pair(to, step::silu(v[0]) * v[2], step::silu(v[1]) * v[3]);
      } else {
        store_logits(args, tile, lane, v);
      }
    }
  }

 private:
  static __device__ __forceinline__ void load_pair(const T* from, float& a, float& b) {
    const float2 pair = unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
    a = pair.x, b = pair.y;
  }

  static __device__ __forceinline__ void load_table(const void* table, bool fp32, int64_t at, float& a, float& b) {
    if (fp32) {
      const float2 pair = *reinterpret_cast<const float2*>(static_cast<const float*>(table) + at);
      a = pair.x, b = pair.y;
    } else {
      load_pair(static_cast<const T*>(table) + at, a, b);
    }
  }

  static __device__ __forceinline__ void store_pair(T* to, float a, float b) {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(a, b);
  }

  __device__ __forceinline__ void store_residual(const LinearArgs& args, int tile, int lane, float (&v)[4]) {
    const bool exists = row_ < args.rows;
    float sum = 0.0f;
    if (exists) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] += a_[i];
        sum += v[i] * v[i];
      }
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (!exists) return;
    const int64_t at = int64_t{row_} * args.features + tile * kWidth + 2 * lane;
    *reinterpret_cast<float2*>(args.residual + at) = make_float2(v[0], v[1]);
    *reinterpret_cast<float2*>(args.residual + at + kWidth / 2) = make_float2(v[2], v[3]);
    T* next = static_cast<T*>(args.x_next) + at;
    store_pair(next, v[0] * b_[0], v[1] * b_[1]);
    store_pair(next + kWidth / 2, v[2] * b_[2], v[3] * b_[3]);
    if (lane == 0) args.squares_next[int64_t{row_} * (args.features / kWidth) + tile] = sum;
  }

  /// The tile is a head of 64.
  __device__ __forceinline__ void store_qkv(const LinearArgs& args, int tile, int lane, float (&v)[4]) {
    const bool is_v = tile >= args.heads + args.heads_kv;
    if (!is_v) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = v[i], y = v[2 + i];
        v[i] = x * b_[i] - y * b_[2 + i];
        v[2 + i] = y * b_[i] + x * b_[2 + i];
      }
    }
    T* to;
    if (tile < args.heads) {
      to = static_cast<T*>(args.out) + (int64_t{row_} * args.heads + tile) * 64;
    } else {
      // Padding, or a cache that is full: nothing is written.
      if (cache_row_ < 0 || position_ < 0 || position_ >= args.capacity) return;
      const int64_t(&stride)[3] = is_v ? args.v_stride : args.k_stride;
      const int head = tile - args.heads - (is_v ? args.heads_kv : 0);
      to = static_cast<T*>(is_v ? args.v_cache : args.k_cache) + cache_row_ * stride[0] + position_ * stride[1] +
           head * stride[2];
    }
    store_pair(to + 2 * lane, v[0], v[1]);
    store_pair(to + 32 + 2 * lane, v[2], v[3]);
  }

  __device__ __forceinline__ void store_logits(const LinearArgs& args, int tile, int lane, const float (&v)[4]) {
    const int feature = tile * kWidth + 2 * lane;
    float* to = args.logits + int64_t{row_} * args.features + feature;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = i % 2 + i / 2 * (kWidth / 2);
      if (feature + at < args.features) to[at] = v[i];
    }
  }

  int row_ = 0;
  int cache_row_ = -1;
  int position_ = 0;
  float a_[4] = {};  // residual, or a part of the sum of squares, then 1 / rms
  float b_[4] = {};  // gain, or cosines and sines
};

}  // namespace vivace
