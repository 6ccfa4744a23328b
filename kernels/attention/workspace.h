// Layout of AttentionParams::workspace. Shared by csrc, which sizes it, and the kernels, which use it.
#pragma once

#include "kernels/attention/params.h"
#include "kernels/attention/splits.h"

namespace vivace {

/// Byte offsets of the parts of the workspace; a part that is not needed has size 0. Parts are aligned to 256 bytes.
struct AttentionWorkspace {
  int64_t q_rotated = 0;    // (total_q, heads, head_dim) of dtype, when rotary is on; always first
  int64_t packets = 0;      // decode, 16-bit types: (parts, rows, head_dim_v) of 16 bytes, see decode_merge.cuh
  int64_t out_partial = 0;  // decode, fp32: (num_splits, heads, total_q, head_dim_v) fp32, when num_splits > 1
  int64_t lse_partial = 0;  // decode, fp32: (num_splits, heads, total_q) fp32
  int64_t bytes = 0;        // of the whole
};

inline int64_t align_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline AttentionWorkspace attention_workspace(const AttentionParams& p) {
  AttentionWorkspace w;
  int64_t at = 0;
  w.q_rotated = at;
  if (p.rotary_cos != nullptr) at = align_256(at + p.total_q * p.heads * p.head_dim * size_of(p.dtype));
  const bool fp32 = p.dtype == DType::kFloat32;
  w.packets = at;
  if (!fp32) at = align_256(at + decode_packet_bytes(p));
  w.out_partial = at;
  if (fp32 && p.num_splits > 1) at = align_256(at + p.num_splits * p.heads * p.total_q * p.head_dim_v * int64_t{4});
  w.lse_partial = at;
  if (fp32 && p.num_splits > 1) at = align_256(at + p.num_splits * p.heads * p.total_q * int64_t{4});
  w.bytes = at;
  return w;
}

}  // namespace vivace
