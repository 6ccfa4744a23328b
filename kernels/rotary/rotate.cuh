// The rotary embedding of one head, in items that one thread each does; shared by rotary.cu and attention/append.cu.
#pragma once

#include "kernels/common/vector.cuh"

namespace vivace {

/// Tables of cosines and sines, (positions, half), and how the pairs lie.
struct RotaryTables {
  const void* cos;
  const void* sin;
  bool fp32;         // fp32, or the type of what is rotated
  bool interleaved;  // pairs (2i, 2i + 1); otherwise (i, i + half)
  int half;          // rotary_dim / 2
  int64_t positions;
};

/// Items of a head: half / kN rotations of kN pairs, then copies of kN of the dimensions past rotary_dim.
template <int kN>
__host__ __device__ inline int rotary_items(int head_dim, int half) {
  return half / kN + (head_dim - 2 * half) / kN;
}

/// Whether items of `vector` elements fit, given 16-byte aligned heads.
inline bool rotary_takes_vectors(int64_t head_dim, int64_t rotary_dim, int vector) {
  return head_dim % vector == 0 && rotary_dim % (2 * vector) == 0;
}

/// kN entries of a table from entry `at`.
template <typename T, int kN>
__device__ __forceinline__ void load_table(const void* table, bool fp32, int64_t at, float (&x)[kN]) {
  if (fp32) {
    load_vector<kN>(static_cast<const float*>(table) + at, x);
  } else {
    load_vector<kN>(static_cast<const T*>(table) + at, x);
  }
}

__device__ __forceinline__ void rotate_pair(float& a, float& b, float cos, float sin) {
  const float x = a;
  a = x * cos - b * sin;
  b = b * cos + x * sin;
}

/// Item `item` of the head at x, rotated to `position` (clamped to the tables), written to the head at `out`; may be in
/// place.
template <typename T, int kN>
__device__ __forceinline__ void rotate_item(const RotaryTables& t, const T* x, T* out, int item, int64_t position) {
  const int rotations = t.half / kN;
  if (item >= rotations) {
    const int at = 2 * t.half + (item - rotations) * kN;
    copy_vector<kN>(out + at, x + at);
    return;
  }
  const int64_t row = position < 0 ? 0 : position < t.positions ? position : t.positions - 1;
  float c[kN], s[kN];
  load_table<T, kN>(t.cos, t.fp32, row * t.half + item * kN, c);
  load_table<T, kN>(t.sin, t.fp32, row * t.half + item * kN, s);

  const int first = t.interleaved ? 2 * item * kN : item * kN;
  const int second = t.interleaved ? first + kN : first + t.half;
  float lo[kN], hi[kN];  // elements first ... first + kN - 1, and second ...
  load_vector<kN>(x + first, lo);
  load_vector<kN>(x + second, hi);
  if (t.interleaved) {
    float pairs[2 * kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) pairs[i] = lo[i], pairs[kN + i] = hi[i];
#pragma unroll
    for (int i = 0; i < kN; ++i) rotate_pair(pairs[2 * i], pairs[2 * i + 1], c[i], s[i]);
#pragma unroll
    for (int i = 0; i < kN; ++i) lo[i] = pairs[i], hi[i] = pairs[kN + i];
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) rotate_pair(lo[i], hi[i], c[i], s[i]);
  }
  store_vector<kN>(out + first, lo);
  store_vector<kN>(out + second, hi);
}

}  // namespace vivace
