// What one warp of attention_decode computes of a tile of keys, on the tensor cores with the keys as rows:
//   S^T (keys x query rows) = K Q^T, then O^T (dims x query rows) += V^T P^T, all as mma.m16n8k16.
// The query rows, those of a group of heads that share the kv head, are the 8 columns of the product, so that a single row
// wastes no more than what tensor cores have plenty of: 8 times the instructions of an element are saved against CUDA cores.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention/decode_plan.cuh"
#include "kernels/attention/hidden_values.cuh"
#include "kernels/attention/mask.cuh"
#include "kernels/attention/scores.cuh"
#include "kernels/common/ptx.cuh"

namespace vivace {

/// A tile of kKeys rows in shared memory: panels of 64 columns, 128 bytes a row, whose 16-byte chunks are permuted as the
/// copy engine's 128-byte swizzle does it. The tile starts at a multiple of 1024 bytes.
template <int kKeys, int kDim>
struct DecodeLayout {
  static constexpr int kPanelBytes = kKeys * 128;
  static constexpr int kTileBytes = kPanelBytes * (kDim / 64);
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return (chunk >> 3) * kPanelBytes + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
  }
};

/// The query rows of a unit: row r is query r / group of head r % group of the kv head's group.
struct DecodeRows {
  int row0;  // first of the CTA
  int rows;  // of it
  int group;
  const FastDivmod& by_group;

  __device__ __forceinline__ void find(int r, int& query, int& head) const { by_group(row0 + r, query, head); }
  __device__ __forceinline__ int query(int r) const {
    int query, head;
    by_group(row0 + r, query, head);
    return query;
  }
  __device__ __forceinline__ int head(int r) const {
    int query, head;
    by_group(row0 + r, query, head);
    return head;
  }
};

/// q as the B operand: fragment [s][n] of dims 16 s ... and rows 8 n ...
template <typename T, int kDim, int kTiles>
struct DecodeQueries {
  uint32_t b[kDim / 16][kTiles][2];

  __device__ __forceinline__ void load(const AttentionParams& p, const Sequence& seq, const DecodeRows& unit, int head0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int r = 8 * n + lane / 4;
      const bool used = r < unit.rows;
      const T* from = static_cast<const T*>(p.q) + seq.q_offset +
                      (used ? unit.query(r) * p.q_stride[1] + (head0 + unit.head(r)) * p.q_stride[2] : 0);
#pragma unroll
      for (int s = 0; s < kDim / 16; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int dim = 16 * s + 8 * half + 2 * (lane % 4);
          uint32_t pair = 0;
          if (used && dim < p.head_dim) pair = *reinterpret_cast<const uint32_t*>(from + dim);
          b[s][n][half] = pair;
        }
      }
    }
  }
};

/// Online softmax state of kTiles * 8 query rows over the keys that this warp has seen: in units of powers of two. A lane
/// holds rows 8 n + 2 (lane % 4) + {0, 1}; of the output dims 16 m + lane / 4 + {0, 8}.
template <typename T, int kKeys, int kDim, int kTiles>
struct DecodeState {
  using Layout = DecodeLayout<kKeys, kDim>;
  static constexpr int kGroups = kKeys / 16;

  float max[kTiles][2], sum[kTiles][2];  // the maximum is the same in all lanes of a row, the sum is this lane's part
  float out[kDim / 16][kTiles][4];       // [2 * e + j]: dim + 8 e, row j

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        max[n][j] = -INFINITY;
        sum[n][j] = 0.0f;
      }
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
      }
    }
  }

  /// A maximum or sum over the lanes that hold the same rows.
  template <typename Op>
  static __device__ __forceinline__ float over_keys(float x, Op op) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) x = op(x, __shfl_xor_sync(~0u, x, distance));
    return x;
  }

  /// Takes in the tile of keys key0 ... at shared address `stage`. masked: not every row sees every key.
  __device__ __forceinline__ void add(const DecodeQueries<T, kDim, kTiles>& q, uint32_t stage, int key0, bool masked,
                                      const DecodeArgs& args, const Sequence& seq, const DecodeRows& unit, int head0) {
    const AttentionParams& p = args.params;
    const int lane = threadIdx.x % 32, quad = lane / 4, pair = 2 * (lane % 4);
    float s[kGroups][kTiles][4];  // [2 * e + j]: key 16 g + lane / 4 + 8 e, row j
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[g][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, stage + Layout::offset(16 * g + lane % 16, 2 * d + lane / 16));
#pragma unroll
        for (int n = 0; n < kTiles; ++n) ptx::mma_m16n8k16<T>(s[g][n], k, q.b[d][n][0], q.b[d][n][1]);
      }
    }

    const float scale = p.softcap > 0.0f ? p.softmax_scale : p.softmax_scale * kLog2E;
    uint32_t any[kGroups][2], all[kGroups][2];  // bit 4 * key: some row, every row sees it
#pragma unroll
    for (int g = 0; g < kGroups; ++g) any[g][0] = any[g][1] = all[g][0] = all[g][1] = ~0u;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[g][n][e] *= scale;
      }
    }
    if (p.softcap > 0.0f || p.alibi_slopes != nullptr) modify(s, key0, p, seq, unit, head0);
    if (p.probe != nullptr) probe(s, key0, args, seq, unit, head0);
    if (masked) {
      uint32_t some = 0, every = ~0u;  // of this lane: bit 2 * g + e
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int r = 8 * n + pair + j;
          const bool used = r < unit.rows;
          const VisibleKeys visible(seq, args.window, used ? unit.query(r) : seq.queries);
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (visible.contains(key0 + 16 * g + quad + 8 * e)) {
                some |= 1u << (2 * g + e);
              } else {
                s[g][n][2 * e + j] = -INFINITY;
                if (used) every &= ~(1u << (2 * g + e));
              }
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          any[g][e] = spread(__ballot_sync(~0u, some >> (2 * g + e) & 1u), false);
          all[g][e] = spread(__ballot_sync(~0u, every >> (2 * g + e) & 1u), true);
        }
      }
    }

#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float largest = max[n][j];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) largest = fmaxf(largest, fmaxf(s[g][n][j], s[g][n][2 + j]));
        largest = over_keys(largest, [](float a, float b) { return fmaxf(a, b); });
        const float offset = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet: not -inf - -inf
        const float rescale = ptx::exp2_approx(max[n][j] - offset);
        max[n][j] = largest;
        float part = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[g][n][2 * e + j];
            x = ptx::exp2_approx(x - offset);
            part += x;
          }
        }
        sum[n][j] = fmaf(sum[n][j], rescale, part);
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
          out[m][n][j] *= rescale;
          out[m][n][2 + j] *= rescale;
        }
      }
    }

    bool settle = false;
    const uint32_t values = stage + Layout::kTileBytes;
    if (masked) settle = holds_hidden_values(values, any, all);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t b[kTiles][2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) b[n][e] = ptx::movmatrix_trans(pack2<T>(s[g][n][2 * e], s[g][n][2 * e + 1]));
      }
      uint32_t keep[2];  // what no row sees, and what is settled apart, must be 0: 0 * NaN is NaN
#pragma unroll
      for (int e = 0; e < 2; ++e) keep[e] = halves(settle ? all[g][e] & any[g][e] : any[g][e], pair);
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, values + Layout::offset(16 * g + lane % 8 + (lane / 16) * 8, 2 * m + lane / 8 % 2));
        v[0] &= keep[0];
        v[1] &= keep[0];
        v[2] &= keep[1];
        v[3] &= keep[1];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) ptx::mma_m16n8k16<T>(out[m][n], v, b[n][0], b[n][1]);
      }
    }
    if (settle) settle_partly_hidden(s, values, any, all);
  }

 private:
  /// Of a ballot whose bits 4 k ... 4 k + 3 speak of key k: bit 4 k, set if one (or, `every`, each) of the four is.
  static __device__ __forceinline__ uint32_t spread(uint32_t ballot, bool every) {
    const uint32_t two = every ? ballot & ballot >> 1 : ballot | ballot >> 1;
    return (every ? two & two >> 2 : two | two >> 2) & 0x11111111u;
  }

  /// The halves of a register that holds keys k and k + 1, all ones where bit 4 k, 4 (k + 1) is set.
  static __device__ __forceinline__ uint32_t halves(uint32_t keys, int k) {
    return (keys >> (4 * k) & 1u) * 0xffffu | (keys >> (4 * k + 4) & 1u) * 0xffff0000u;
  }

  /// Whether a key that some rows see and others do not has values that are not finite.
  static __device__ __forceinline__ bool holds_hidden_values(uint32_t values, const uint32_t (&any)[kGroups][2],
                                                             const uint32_t (&all)[kGroups][2]) {
    uint32_t partly = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) partly |= (any[g][0] & ~all[g][0]) | (any[g][1] & ~all[g][1]);
    if (partly == 0) return false;
    const int lane = threadIdx.x % 32;
    uint32_t bad = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, values + Layout::offset(16 * g + lane % 8 + (lane / 16) * 8, 2 * m + lane / 8 % 2));
        const uint32_t low = halves(any[g][0] & ~all[g][0], 2 * (lane % 4));
        const uint32_t high = halves(any[g][1] & ~all[g][1], 2 * (lane % 4));
        bad |= (not_finite<T>(v[0]) | not_finite<T>(v[1])) & low;
        bad |= (not_finite<T>(v[2]) | not_finite<T>(v[3])) & high;
      }
    }
    return __any_sync(~0u, bad != 0);
  }

  /// Adds p * v of the keys that some rows see and others do not, for the rows that do. s: the probabilities.
  __device__ __forceinline__ void settle_partly_hidden(const float (&s)[kGroups][kTiles][4], uint32_t values,
                                                       const uint32_t (&any)[kGroups][2],
                                                       const uint32_t (&all)[kGroups][2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t partly = any[g][e] & ~all[g][e];
#pragma unroll 1
        for (int k = 0; k < 8; ++k) {
          if ((partly >> (4 * k) & 1u) == 0) continue;
          float prob[kTiles][2];
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) prob[n][j] = __shfl_sync(~0u, s[g][n][2 * e + j], 4 * k + lane % 4);
          }
#pragma unroll
          for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint32_t at = values + Layout::offset(16 * g + 8 * e + k, 2 * m + h) + 4 * (lane / 8);
              const float2 both = unpack2<T>(ptx::ld_shared(at));
              const float v = lane / 4 % 2 ? both.y : both.x;
#pragma unroll
              for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                  if (prob[n][j] != 0.0f) out[m][n][2 * h + j] = fmaf(prob[n][j], v, out[m][n][2 * h + j]);
                }
              }
            }
          }
        }
      }
    }
  }

  /// Softcap and alibi; scores become powers of two.
  static __device__ __forceinline__ void modify(float (&s)[kGroups][kTiles][4], int key0, const AttentionParams& p,
                                                const Sequence& seq, const DecodeRows& unit, int head0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = min(8 * n + 2 * (lane % 4) + j, unit.rows - 1);
        const float slope = p.alibi_slopes == nullptr
                                ? 0.0f
                                : p.alibi_slopes[seq.batch * p.alibi_batch_stride + head0 + unit.head(r)] * kLog2E;
        const int diagonal = unit.query(r) + seq.keys - seq.queries;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[g][n][2 * e + j];
            if (p.softcap > 0.0f) x = softcapped(x, p.softcap) * kLog2E;
            x -= slope * fabsf(static_cast<float>(diagonal - (key0 + 16 * g + lane / 4 + 8 * e)));
          }
        }
      }
    }
  }

  /// Stores the scores of the probed rows, as powers of two, where their probabilities will be.
  static __device__ __forceinline__ void probe(const float (&s)[kGroups][kTiles][4], int key0, const DecodeArgs& args,
                                               const Sequence& seq, const DecodeRows& unit, int head0) {
    const AttentionParams& p = args.params;
    const int head = static_cast<int>(p.probe_head) - head0;
    if (head < 0 || head >= unit.group) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int r = 8 * n + 2 * (lane % 4) + j;
        if (r >= unit.rows || unit.head(r) != head) continue;
        const int64_t row = unit.query(r) - (seq.queries - p.probe_rows);
        if (row < 0 || row >= p.probe_rows) continue;
        float* to = p.probe + (seq.batch * p.probe_rows + row) * p.probe_capacity;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = key0 + 16 * g + lane / 4 + 8 * e;
            if (key < p.probe_capacity) to[key] = s[g][n][2 * e + j];
          }
        }
      }
    }
  }
};

}  // namespace vivace
