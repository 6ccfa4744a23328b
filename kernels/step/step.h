// The one struct that a token step is, from the operator down to the kernels, on CPU and on CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/dtype.h"

namespace vivace {

/// One token through a Llama decoder for each of `rows` rows: embedding, all layers over the KV cache, final norm, head.
/// Pointers are memory of the call's device; strides are in elements. Weights are row-major [out, in] and stacked over the
/// layers, contiguous, 16-byte aligned, all of `dtype`. Nothing of the step's inputs is known to the host but the sizes:
/// tokens, positions, lengths and cache rows are read on the device, so that a captured step serves every length.
///
/// Row r, with c = cache_batch_idx[r], n = cache_seqlens[r]:
///   x       = speech_emb[tokens[q]] + speech_pos_emb[positions[q]], q = row_request[r], rounded to dtype
///   a layer = x += out(attention(rotary(qkv(rms_norm(x))))); x += down(silu(gate(h)) * up(h)), h = rms_norm(x)
///   logits  = head(rms_norm(x)), fp32
/// The new key and value are written to position n of cache row c and seen by the row itself: it attends to n + 1 keys.
///   n at capacity (or past it): nothing is written; logits unspecified.
///   c negative: padding. No key is read or written; logits unspecified, but no fault and no effect on other rows.
///   tokens, positions, row_request outside their tables are clamped into them on CUDA, an error on the CPU.
///   c at cache_rows or past it is an error on the CPU; on CUDA the caller must not ask for it.
/// Rows may differ in everything; their order and number do not change what a row computes within one kernel family.
struct StepParams {
  DType dtype = DType::kBFloat16;  // of weights, embeddings and caches
  int arch = 0;                    // whose instructions to use: 80 or 90, and so on; the device's own or an older one

  int64_t rows = 0;
  int64_t requests = 0;
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t heads = 0;
  int64_t heads_kv = 0;  // divides heads; head h reads kv head h / (heads / heads_kv)
  int64_t head_dim = 0;  // even; heads * head_dim need not be hidden
  int64_t intermediate = 0;
  int64_t vocab = 0;             // rows of head
  int64_t speech_tokens = 0;     // rows of speech_emb
  int64_t speech_positions = 0;  // rows of speech_pos_emb
  float eps = 1e-5f;             // of the norms
  float softmax_scale = 1.0f;    // 1 / sqrt(head_dim)

  const int64_t* tokens = nullptr;       // (requests)
  const int64_t* positions = nullptr;    // (requests)
  const int64_t* row_request = nullptr;  // (rows)

  const void* speech_emb = nullptr;      // (speech_tokens, hidden)
  const void* speech_pos_emb = nullptr;  // (speech_positions, hidden)
  const void* input_norm = nullptr;      // (layers, hidden)
  const void* qkv = nullptr;             // (layers, (heads + 2 * heads_kv) * head_dim, hidden): q | k | v
  const void* out = nullptr;             // (layers, hidden, heads * head_dim)
  const void* post_norm = nullptr;       // (layers, hidden)
  const void* gate_up = nullptr;         // (layers, 2 * intermediate, hidden): gate | up
  const void* down = nullptr;            // (layers, hidden, intermediate)
  const void* norm = nullptr;            // (hidden)
  const void* head = nullptr;            // (vocab, hidden)

  const void* rotary_cos = nullptr;  // (rotary_positions, head_dim / 2), contiguous; pairs are (i, i + head_dim / 2)
  const void* rotary_sin = nullptr;
  DType rotary_dtype = DType::kFloat32;  // fp32 or dtype
  int64_t rotary_positions = 0;          // at least capacity

  void* k_cache = nullptr;  // (layers, cache_rows, capacity, heads_kv, head_dim), any strides but the last, which is 1
  void* v_cache = nullptr;
  int64_t k_stride[4] = {0, 0, 0, 0};  // layer, cache row, position, kv head
  int64_t v_stride[4] = {0, 0, 0, 0};
  int64_t cache_rows = 0;
  int64_t capacity = 0;
  const int32_t* cache_seqlens = nullptr;    // (rows) keys before the step
  const int32_t* cache_batch_idx = nullptr;  // (rows) cache row; negative: padding

  float* logits = nullptr;  // (rows, vocab), contiguous

  /// Attention probabilities of single heads, fp32: probe i of row r is probes[(i * probe_rows + r) * probe_capacity + key],
  /// written for the keys 0 ... n and 0 from there to probe_capacity.
  static constexpr int kMaxProbes = 8;
  float* probes = nullptr;  // (probe_count, probe_rows, 1, probe_capacity), or null
  int64_t probe_count = 0;
  int64_t probe_rows = 0;  // at least rows
  int64_t probe_capacity = 0;
  int32_t probe_layer[kMaxProbes] = {};
  int32_t probe_head[kMaxProbes] = {};

  /// Zeroed once by its owner and kept between calls on one stream: sequence numbers live there. Calls may differ in `rows`
  /// (and in nothing else of the shape), so what survives a call must lie where `rows` does not move it.
  void* workspace = nullptr;  // 256-byte aligned
  size_t workspace_bytes = 0;
};

}  // namespace vivace
