// What the roles of the split step share: rings, the work of a CTA, shared memory.
#pragma once

#include <algorithm>

#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/vector.cuh"
#include "kernels/step/softmax_state.cuh"
#include "kernels/step/split.h"
#include "kernels/step/split_ptx.cuh"

namespace vivace::split {

/// A row of a half, with the keys that were there before the step and the position of the new one, or -1: there is none.
struct Row {
  int32_t row, cache_row, keys, newest;
};

using State = step::SoftmaxState;

/// Behind the ring of a CTA that attends.
struct AttentionShared {
  float merged[2][2][4 * State::kFloats];  // (warpgroup, its turn, warp) softmax states
  Row rows[2][kHalf];                      // longest first
  int32_t lengths[kMaxRows];
  uint64_t full[2][8], empty[2][8];  // keys and values, of a warpgroup
  uint64_t queries[2];               // q, k and v of a half may be read
};

/// Behind the activations and the ring of a CTA that multiplies.
struct ProductShared {
  float inverse[kHalf];            // 1 / rms
  uint64_t full[16], empty[16];    // weights
  uint64_t x_full[8], x_empty[8];  // activations
  uint64_t ready;                  // what others have written may be read
};

template <typename S>
inline constexpr size_t kProductBytes = S::x_bytes + S::stages* kStageBytes;
template <typename S>
inline constexpr size_t kAttentionBytes = 2 * S::attention_stages* kStageBytes;
template <typename S>
inline constexpr size_t kSharedBytes = std::max(kProductBytes<S> + sizeof(ProductShared),
                                                kAttentionBytes<S> + sizeof(AttentionShared));

/// A place in a ring of `slots`.
struct Position {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int slots) {
    const bool wraps = slot + 1 == slots;
    slot = wraps ? 0 : slot + 1;
    parity ^= wraps ? 1 : 0;
  }
};

/// What all CTAs know.
template <typename S>
struct Cta {
  const Args& args;
  int rows, cta;  // `cta` of those of its role
  bool attends;

  __device__ __forceinline__ explicit Cta(const Args& a) : args(a), rows(static_cast<int>(a.p.rows)) {
    // A CTA of each role in turn, as far as there are both: the two of a cluster share their way to L2.
    const int block = static_cast<int>(blockIdx.x), pairs = min(S::products, a.attentions);
    attends = block < 2 * pairs ? block % 2 == 1 : a.attentions > S::products;
    cta = block < 2 * pairs ? block / 2 : block - pairs;
  }
  /// How many rows the first half has, which come first; and a half.
  __device__ __forceinline__ int first() const { return (rows + 1) / 2; }
  __device__ __forceinline__ int rows_of(int half) const { return half == 0 ? first() : rows - first(); }

  using L = Layout<S::heads>;
  __device__ __forceinline__ uint32_t* counter(int i) const {
    return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.p.workspace) + L::counters) + i * Counters::stride;
  }
  template <typename P>
  __device__ __forceinline__ P* at(int half, size_t offset) const {
    return reinterpret_cast<P*>(static_cast<uint8_t*>(args.p.workspace) + half * L::half + offset);
  }

  /// Keys of a row that were there before the step.
  __device__ __forceinline__ int old_keys(int row) const {
    if (args.p.cache_batch_idx[row] < 0) return 0;
    return max(0, min(args.p.cache_seqlens[row], static_cast<int>(args.p.capacity)));
  }
  /// Where the step's key goes; -1: nowhere.
  __device__ __forceinline__ int newest(int row) const {
    const int n = args.p.cache_seqlens[row];
    return args.p.cache_batch_idx[row] >= 0 && n >= 0 && n < args.p.capacity ? n : -1;
  }
};

/// A CTA that attends: the units, a row and a head each, are dealt to the warpgroups longest first, there and back.
template <typename S>
struct AttentionCta : Cta<S> {
  uint8_t* ring;
  AttentionShared& shared;
  __device__ __forceinline__ AttentionCta(const Cta<S>& c, uint8_t* memory)
      : Cta<S>(c), ring(memory), shared(*reinterpret_cast<AttentionShared*>(memory + kAttentionBytes<S>)) {
    static_assert(S::attention_stages <= 8 && kMaxRows <= S::threads);  // barriers; a thread a row in sort()
  }

  /// By all threads, then a barrier, then sort().
  __device__ __forceinline__ void read_lengths() const {
    const int t = static_cast<int>(threadIdx.x);
    if (t < this->rows) shared.lengths[t] = this->old_keys(t);
  }
  /// Sorts the rows of each half by their keys, longest first. By all threads; then a barrier.
  __device__ __forceinline__ void sort() const {
    const int t = static_cast<int>(threadIdx.x);
    if (t >= this->rows) return;
    const int half = t >= this->first(), begin = half * this->first(), end = half ? this->rows : this->first();
    const int mine = shared.lengths[t];
    int rank = 0;
    for (int r = begin; r < end; ++r) {
      const int other = shared.lengths[r];
      rank += other > mine || (other == mine && r < t) ? 1 : 0;
    }
    shared.rows[half][rank] = {t - begin, max(0, this->args.p.cache_batch_idx[t]), mine, this->newest(t)};
  }

  /// The units of a warpgroup in a slot: a half in a layer. Who gets one more changes from slot to slot.
  struct Units {
    int workers, place, count;
    __device__ __forceinline__ int operator[](int j) const { return j * workers + (j % 2 ? workers - 1 - place : place); }
  };
  __device__ __forceinline__ Units units(int layer, int half, int group) const {
    const int attentions = this->args.attentions, total = this->rows_of(half) * S::heads;
    Units u;
    u.workers = 2 * attentions;
    const int rounds = total / u.workers, left = total % u.workers;
    u.place = (this->cta + group * attentions + (2 * layer + half) * left) % u.workers;
    u.count = rounds + (u[rounds] < total ? 1 : 0);
    return u;
  }
};

/// A CTA that multiplies: two of the 8 workers of a head.
template <typename S>
struct ProductCta : Cta<S> {
  uint8_t *x, *ring;
  ProductShared& shared;
  int tile, slice;  // of `down`
  __device__ __forceinline__ ProductCta(const Cta<S>& c, uint8_t* memory)
      : Cta<S>(c),
        x(memory),
        ring(memory + S::x_bytes),
        shared(*reinterpret_cast<ProductShared*>(memory + kProductBytes<S>)),
        tile(c.cta % S::heads),
        slice(c.cta / S::heads) {
    static_assert(S::stages <= 16 && S::groups <= 8);  // barriers
  }
  __device__ __forceinline__ bool has_tile(int tile) const { return tile * int64_t{64} < this->args.p.vocab; }
};

}  // namespace vivace::split
