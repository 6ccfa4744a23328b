// The hot loops, compiled once for each instruction set (kernels_*.cpp) and chosen at run time. The structs and function
// types here are all that those files share with the rest.
#pragma once

#include <cstdint>

#include "csrc/cpu/sequence.h"
#include "kernels/attention/backward_params.h"

namespace vivace::cpu {

constexpr int64_t kKeyBlock = 64;       // keys that a tile of scores spans
constexpr int64_t kMaxChunkRows = 8;    // query rows of one kv head that attention_chunk takes
constexpr int64_t kChunkHeadRows = 64;  // query rows of all kv heads of one attention_chunk

/// Widths of scratch rows are padded to this many floats, at least the lanes of the widest vector.
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

/// Many queries: rows row_begin ... row_end - 1 of one kv head against all of their keys. A row is a query and one of the
/// heads / heads_kv heads that share the kv head: row = query * group + head in the group.
struct AttentionBlock {
  const AttentionParams* params;
  const Sequence* sequence;
  int64_t kv_head;
  int64_t row_begin, row_end;
  float* scratch;  // attention_block_scratch() floats
};
constexpr int64_t attention_block_scratch(int64_t head_dim, int64_t head_dim_v, int64_t rows) {
  return rows * (padded(head_dim) + padded(head_dim_v) + 2) + kKeyBlock * (head_dim + padded(head_dim_v) + 16 + 2);
}

/// Few queries (decode): every row of the kv heads kv_begin ... kv_end - 1 against the keys key_begin ... key_end - 1.
/// `partial` gets for each row, in the order kv head, row: out (padded(head_dim_v), not normalised), the largest score and
/// the sum of exponentials relative to it.
struct AttentionChunk {
  const AttentionParams* params;
  const Sequence* sequence;
  int64_t kv_begin, kv_end;
  int64_t key_begin, key_end;
  float* partial;
  float* scratch;  // attention_chunk_scratch() floats
};
constexpr int64_t partial_stride(int64_t head_dim_v) { return padded(head_dim_v) + 2; }
constexpr int64_t attention_chunk_scratch(int64_t head_dim, int64_t rows) {
  return rows * (padded(head_dim) + kKeyBlock) + 2 * kKeyBlock;
}

/// Gradients of everything that one kv head of one sequence takes part in.
struct AttentionBackwardHead {
  const AttentionBackwardParams* params;
  const Sequence* sequence;
  int64_t kv_head;
  float* scratch;  // attention_backward_scratch() floats
};
constexpr int64_t kBackwardRows = 48;
constexpr int64_t attention_backward_scratch(int64_t head_dim, int64_t head_dim_v, int64_t rows) {
  return rows * (2 * padded(head_dim) + padded(head_dim_v) + 2) + 2 * kBackwardRows * kKeyBlock +
         kKeyBlock * (head_dim + head_dim_v + 2 * padded(head_dim) + padded(head_dim_v) + 3);
}

struct TypedKernels {
  void (*attention_block)(const AttentionBlock&);
  void (*attention_chunk)(const AttentionChunk&);
  void (*attention_backward)(const AttentionBackwardHead&);
  void (*rms_norm)(const void* x, void* residual, const void* weight, void* out, int64_t width, float eps);  // one row
  void (*silu_gate)(const void* x, void* out, int64_t width);                                                // one row
  /// heads vectors of one token; cos and sin are its table rows in fp32, rotary_dim / 2 each
  void (*rotary)(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t heads, int64_t head_dim,
                 int64_t rotary_dim, const float* cos, const float* sin, bool interleaved);
  /// out (rows, outputs) = x (rows, depth) @ weight (outputs, depth)^T; linear_float: out is fp32 whatever the dtype is
  void (*linear)(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride, int64_t rows,
                 int64_t outputs, int64_t depth);
  void (*linear_float)(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride, int64_t rows,
                       int64_t outputs, int64_t depth);
};

struct Kernels {
  const char* name;
  int lanes;
  TypedKernels float32, bfloat16, float16;
  /// out = e^(x - shift), the sum of it is returned
  double (*exp)(const float* x, float shift, float* out, int64_t count);

  const TypedKernels& of(DType dtype) const {
    return dtype == DType::kBFloat16 ? bfloat16 : dtype == DType::kFloat16 ? float16 : float32;
  }
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

/// The widest set that this machine runs, or the one that the environment's VIVACE_CPU names: baseline, avx2, avx512. Throws
/// Error where it names none, or one that this machine does not run.
const Kernels& kernels();

/// All sets that this machine runs, narrowest first; null-terminated. For tests.
const Kernels* const* available_kernels();
/// Makes kernels() return `chosen`; null: automatic. For tests; not while operators run.
void force_kernels(const Kernels* chosen);

}  // namespace vivace::cpu
