// Which keys a query sees: causal, windows, left padding and lengths are one interval of keys a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention/sequence.cuh"

namespace vivace {

/// Keys before and after the diagonal that stay visible; kOpen: all.
struct Window {
  static constexpr int kOpen = -1;
  int left = kOpen, right = kOpen;

  Window() = default;
  explicit Window(const AttentionParams& p) : left(side(p.window_left)), right(p.causal ? 0 : side(p.window_right)) {}

 private:
  static int side(int64_t w) { return w < 0 || w >= (int64_t{1} << 30) ? kOpen : static_cast<int>(w); }
};

/// The keys [first, first + count) that a row sees.
struct VisibleKeys {
  int first;
  uint32_t count;

  __device__ __forceinline__ VisibleKeys(const Sequence& seq, const Window& window, int i) {
    const int diagonal = i + seq.keys - seq.queries;
    first = window.left < 0 ? seq.key_begin : max(seq.key_begin, diagonal - window.left);
    const int end = window.right < 0 ? seq.key_end : min(seq.key_end, diagonal + window.right + 1);
    count = i < seq.queries && end > first ? end - first : 0;
  }

  __device__ __forceinline__ bool contains(int j) const { return static_cast<uint32_t>(j - first) < count; }
};

/// Blocks of kN keys for query rows [row0, row0 + rows): [begin, end) are visited; of these, [full_begin, full_end) are
/// seen whole by every row and need no mask.
template <int kN>
struct KeyBlocks {
  int begin, end, full_begin, full_end;

  __device__ __forceinline__ KeyBlocks(const Sequence& seq, const Window& window, int row0, int rows) {
    const int last = min(row0 + rows, seq.queries) - 1;  // rows past the queries see nothing and are not stored
    const int shift = seq.keys - seq.queries;
    int first_min = seq.key_begin, first_max = seq.key_begin, end_min = seq.key_end, end_max = seq.key_end;
    if (window.left >= 0) {
      first_min = max(first_min, row0 + shift - window.left);
      first_max = max(first_max, last + shift - window.left);
    }
    if (window.right >= 0) {
      end_min = min(end_min, row0 + shift + window.right + 1);
      end_max = min(end_max, last + shift + window.right + 1);
    }
    const bool any = row0 <= last && first_min < end_max;
    begin = any ? first_min / kN : 0;
    end = any ? (end_max + kN - 1) / kN : 0;
    full_begin = (first_max + kN - 1) / kN;
    full_end = end_min < 0 ? 0 : end_min / kN;
  }

  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool masked(int n) const { return n < full_begin || n >= full_end; }
};

/// Sets what a row does not see to -inf. s: kFrags accumulators of 8 columns (rows lane / 4 and lane / 4 + 8, as mma and
/// wgmma give them); column0: the key of s[0][0], which includes the lane's 2 * (lane % 4).
template <int kFrags>
__device__ __forceinline__ void mask_scores(float (&s)[kFrags][4], const VisibleKeys& upper, const VisibleKeys& lower,
                                            int column0) {
#pragma unroll
  for (int f = 0; f < kFrags; ++f) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int j = column0 + 8 * f + (e & 1);
      // By select, not by adding -inf: what stands behind the mask may be NaN.
      s[f][e] = (e < 2 ? upper : lower).contains(j) ? s[f][e] : -INFINITY;
    }
  }
}

}  // namespace vivace
