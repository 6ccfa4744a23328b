#include "csrc/cpu/ops.h"
#include "csrc/cpu/rotate.h"
#include "csrc/error.h"
#include "csrc/parallel.h"

namespace vivace::cpu {

namespace {

template <typename Table>
void rotate_double(const TokenHeads& t, int64_t rotary_dim, const Table* cos, const Table* sin, bool interleaved) {
  const int64_t half = rotary_dim / 2;
  for (int64_t h = 0; h < t.heads; ++h) {
    const double* x = static_cast<const double*>(t.x) + h * t.x_stride;
    double* out = static_cast<double*>(t.out) + h * t.out_stride;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
      const double a = x[first], b = x[second];
      out[first] = a * cos[i] - b * sin[i];
      out[second] = b * cos[i] + a * sin[i];
    }
    for (int64_t i = rotary_dim; i < t.head_dim; ++i) out[i] = x[i];
  }
}

template <typename T>
void convert(const char* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(reinterpret_cast<const T*>(from)[i]);
}

}  // namespace

Rotation::Rotation(DType dtype, const void* cos, const void* sin, DType table_dtype, int64_t rotary_dim, bool interleaved)
    : dtype_(dtype),
      table_dtype_(table_dtype),
      cos_(static_cast<const char*>(cos)),
      sin_(static_cast<const char*>(sin)),
      rotary_dim_(rotary_dim),
      interleaved_(interleaved) {
  if (size_of(table_dtype) == 2) row_.resize(static_cast<size_t>(rotary_dim));
}

void Rotation::operator()(const TokenHeads& t, int64_t position) {
  const int64_t half = rotary_dim_ / 2;
  const char* cos = cos_ + position * half * size_of(table_dtype_);
  const char* sin = sin_ + position * half * size_of(table_dtype_);
  if (dtype_ == DType::kFloat64) {
    if (table_dtype_ == DType::kFloat64) {
      return rotate_double(t, rotary_dim_, reinterpret_cast<const double*>(cos), reinterpret_cast<const double*>(sin),
                           interleaved_);
    }
    return rotate_double(t, rotary_dim_, reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin),
                         interleaved_);
  }
  const float* cos_row = reinterpret_cast<const float*>(cos);
  const float* sin_row = reinterpret_cast<const float*>(sin);
  if (!row_.empty()) {
    const auto convert_row = table_dtype_ == DType::kBFloat16 ? convert<BFloat16> : convert<Float16>;
    convert_row(cos, half, row_.data());
    convert_row(sin, half, row_.data() + half);
    cos_row = row_.data();
    sin_row = row_.data() + half;
  }
  kernels().of(dtype_).rotary(t.x, t.x_stride, t.out, t.out_stride, t.heads, t.head_dim, rotary_dim_, cos_row, sin_row,
                              interleaved_);
}

void rotary(const RotaryParams& p) {
  const auto position_of = [&p](int64_t token) -> int64_t {
    if (p.positions == nullptr) return p.seqlen > 0 ? token % p.seqlen : token;
    if (p.position_dtype == DType::kInt64) return static_cast<const int64_t*>(p.positions)[token];
    return static_cast<const int32_t*>(p.positions)[token];
  };
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t position = position_of(t);
    check(position >= 0 && position < p.max_position, "rotary_embedding", "token ", t, " has position ", position,
          ", cos and sin have ", p.max_position, " positions");
  }
  const int64_t size = size_of(p.dtype);
  const int64_t grain = 16384 / (p.heads * p.head_dim + 1) + 1;
  parallel_for(0, p.tokens, grain, [&](int64_t begin, int64_t end) {
    Rotation rotate(p.dtype, p.cos, p.sin, p.table_dtype, p.rotary_dim, p.interleaved);
    for (int64_t t = begin; t < end; ++t) {
      rotate({static_cast<const char*>(p.x) + t * p.x_stride[0] * size, p.x_stride[1],
              static_cast<char*>(p.out) + t * p.out_stride[0] * size, p.out_stride[1], p.heads, p.head_dim},
             position_of(t));
    }
  });
}

}  // namespace vivace::cpu
