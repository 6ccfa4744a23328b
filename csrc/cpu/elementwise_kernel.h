// RMSNorm, SiLU-gate, rotary embedding and the exponentials of sampling, a row at a time.
#pragma once

#include "csrc/cpu/vector.h"

namespace vivace::cpu::VIVACE_ISA {
namespace {

template <typename T>
void rms_norm_row(const void* x_row, void* residual_row, const void* weight_row, void* out_row, int64_t width, float eps) {
  const T* x = static_cast<const T*>(x_row);
  const T* weight = static_cast<const T*>(weight_row);
  T* residual = static_cast<T*>(residual_row);
  T* out = static_cast<T*>(out_row);
  if (residual != nullptr) {
    for (int64_t i = 0; i < width; i += kLanes) {
      store_first(residual + i, load_first(x + i, width - i) + load_first(residual + i, width - i), width - i);
    }
    x = residual;
  }
  Vec squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  for (; i < width; i += kLanes) {
    const Vec a = load_first(x + i, width - i);
    squares[0] += a * a;
  }
  const float scale = 1.0f / __builtin_sqrtf(sum_of(squares[0] + squares[1]) / static_cast<float>(width) + eps);
  for (i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    store_first(out + i, load_first(x + i, n) * scale * load_first(weight + i, n), n);
  }
}

template <typename T>
void silu_gate_row(const void* x_row, void* out_row, int64_t width) {
  const T* gate = static_cast<const T*>(x_row);
  const T* up = gate + width;
  T* out = static_cast<T*>(out_row);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t n = width - i;
    const Vec g = load_first(gate + i, n);
    // e^-g may be Inf: g / Inf is the right 0, and -Inf / Inf, where silu's limit is 0 too, is what torch makes NaN
    store_first(out + i, g / (1.0f + exp(-g)) * load_first(up + i, n), n);
  }
}

/// Pairs (i, i + half) of one head.
template <typename T>
VIVACE_INLINE void rotate_halves(const T* x, T* out, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Vec a = load_first(x + i, n), b = load_first(x + half + i, n);
    const Vec c = load_first(cos + i, n), s = load_first(sin + i, n);
    store_first(out + i, a * c - b * s, n);
    store_first(out + half + i, b * c + a * s, n);
  }
}

/// Pairs (2i, 2i + 1) of one head.
template <typename T>
VIVACE_INLINE void rotate_pairs(const T* x, T* out, int64_t half, const float* cos, const float* sin) {
  constexpr int64_t kPairs = kLanes / 2;
  for (int64_t i = 0; i < half; i += kPairs) {
    const int64_t n = min64(kPairs, half - i);
    float c[kLanes] = {}, s[kLanes] = {};
    for (int64_t j = 0; j < n; ++j) {
      c[2 * j] = c[2 * j + 1] = cos[i + j];
      s[2 * j] = -sin[i + j];
      s[2 * j + 1] = sin[i + j];
    }
    const Vec v = load_first(x + 2 * i, 2 * n);
    store_first(out + 2 * i, v * load(c) + exchange<1>(v) * load(s), 2 * n);
  }
}

template <typename T>
void rotary_token(const void* x_token, int64_t x_stride, void* out_token, int64_t out_stride, int64_t heads,
                  int64_t head_dim, int64_t rotary_dim, const float* cos, const float* sin, bool interleaved) {
  for (int64_t h = 0; h < heads; ++h) {
    const T* x = static_cast<const T*>(x_token) + h * x_stride;
    T* out = static_cast<T*>(out_token) + h * out_stride;
    if (interleaved) {
      rotate_pairs(x, out, rotary_dim / 2, cos, sin);
    } else {
      rotate_halves(x, out, rotary_dim / 2, cos, sin);
    }
    if (x != out && rotary_dim < head_dim) {
      std::memcpy(out + rotary_dim, x + rotary_dim, static_cast<size_t>(head_dim - rotary_dim) * sizeof(T));
    }
  }
}

double exp_row(const float* x, float shift, float* out, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = min64(kLanes, count - i);
    const Vec e = exp(load_first(x + i, n) - shift);
    store_first(out + i, e, n);
    for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(e[j]);
  }
  return sum;
}

}  // namespace
}  // namespace vivace::cpu::VIVACE_ISA
