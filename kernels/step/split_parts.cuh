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

/// A row of a part, with the keys that were there before the step and the position of the new one, or -1: there is none.
struct Row {
  int32_t row, cache_row, keys, newest;
};

using State = step::SoftmaxState;

/// A row and a head in a slot, which is a part in a layer: the row's place among those of its part, and the head's group.
/// Behind the last slot there is none.
struct Unit {
  int32_t slot, place, head, group;
};
/// Units that a warpgroup has been told of.
inline constexpr int kUnits = 8;

/// Behind the ring of a CTA that attends.
struct AttentionShared {
  float merged[2][2][4 * State::kFloats];  // (warpgroup, its turn, warp) softmax states
  uint4 fresh[2][2][3 * 8];        // (warpgroup, its turn): q, newest key, newest value of a unit, 64 dimensions each
  Row rows[kMaxParts][kPartRows];  // longest first
  int32_t lengths[kMaxRows];
  int32_t keys[kMaxParts];           // of all rows of a part
  Unit units[2][kUnits];             // of a warpgroup
  uint64_t full[2][8], empty[2][8];  // keys and values, of a warpgroup
  // Where something is read or written without the copy engine, all lanes arrive, so that racecheck can follow.
  uint64_t told[2][kUnits], taken[2][kUnits];  // units
  uint64_t begin[2][2], end[2][2];             // (warpgroup, its turn): `fresh` has been written, `merged` has
};

/// Behind the activations and the ring of a CTA that multiplies.
struct ProductShared {
  float inverse[kPartRows];        // 1 / rms
  uint64_t full[16], empty[16];    // weights
  uint64_t x_full[8], x_empty[8];  // activations
  uint64_t ready;                  // what others have written may be read
  uint32_t before[kMaxParts];      // launches with a part since the workspace was zeroed
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
  /// How many rows a part has; the last ones may have fewer.
  __device__ __forceinline__ int most() const { return (rows + S::parts - 1) / S::parts; }
  __device__ __forceinline__ int rows_of(int part) const { return max(0, min(most(), rows - part * most())); }

  using L = Layout<S::heads>;
  __device__ __forceinline__ uint32_t* counter(int i) const {
    return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.p.workspace) + L::counters) + i * Counters::stride;
  }
  template <typename P>
  __device__ __forceinline__ P* at(int part, size_t offset) const {
    return reinterpret_cast<P*>(static_cast<uint8_t*>(args.p.workspace) + part * L::part + offset);
  }

  /// Units of a slot that have been dealt to who asked.
  __device__ __forceinline__ uint32_t* asked(int slot) const {
    return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.p.workspace) + L::asked) + slot * Counters::stride;
  }

  /// Where 8 columns of a row are in x or silu(gate) * up, (columns / 8, 64, 8).
  template <typename T>
  __device__ __forceinline__ T* eight(int part, size_t matrix, int row, int column) const {
    return at<T>(part, matrix) + (column / 8 * kPartRows + row) * 8;
  }

  /// q, k and v of a row and head in a layer.
  __device__ __forceinline__ uint8_t* fresh(int layer, int part, int row, int head) const {
    return at<uint8_t>(part, L::fresh) + ((layer % 2 * kPartRows + row) * S::heads + head) * int64_t{3 * 128};
  }
};

/// A CTA that attends. Units go to the warpgroups in an order: those of the first group of heads first, so that `out` can
/// begin with them, and the longest first.
///
/// Who waits for q, k and v of a unit in a layer may find those of two layers before unless their reader has armed the words
/// again. It has: whoever waits had a unit of the layer between, whose q follows from all attention of two layers before.
/// Where there are fewer units than warpgroups, a unit has the same reader in all layers.
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
    if (t < this->rows) shared.lengths[t] = step::old_keys(this->args.p, t);
    if (t < S::parts) shared.keys[t] = 0;
  }
  /// Sorts the rows of each part by their keys, longest first. By all threads; then a barrier.
  __device__ __forceinline__ void sort() const {
    const int t = static_cast<int>(threadIdx.x);
    if (t >= this->rows) return;
    const int part = t / this->most(), begin = part * this->most(), end = begin + this->rows_of(part);
    const int mine = shared.lengths[t];
    int rank = 0, keys = 0;
    for (int r = begin; r < end; ++r) {
      const int other = shared.lengths[r];
      keys += other;  // below 2^31: 64 rows of 2^24 keys at most
      rank += other > mine || (other == mine && r < t) ? 1 : 0;
    }
    if (rank == 0) shared.keys[part] = keys;
    shared.rows[part][rank] = {t - begin, max(0, this->args.p.cache_batch_idx[t]), mine, step::newest_key(this->args.p, t)};
  }

  /// Keys of the part that has most.
  __device__ __forceinline__ int most_keys() const {
    int most = 0;
#pragma unroll
    for (int part = 0; part < S::parts; ++part) most = max(most, shared.keys[part]);
    return most;
  }
  /// CTAs that attend. Where a part has few keys, the products are what takes the time, and memory's queue holds them up the
  /// more the more CTAs load: then a quarter of those that could does nothing. The numbers are measured.
  __device__ __forceinline__ int attentions() const {
    constexpr int kKeysOfCta = S::parts == 2 ? 250 : 280;
    return max((3 * this->args.attentions + 3) / 4, min(most_keys() / kKeysOfCta, this->args.attentions));
  }
  /// Warpgroups that attend, and the place of one among them, or -1.
  __device__ __forceinline__ int workers() const { return 2 * attentions(); }
  __device__ __forceinline__ int worker(int group) const {
    const int n = attentions();
    return this->cta < n ? this->cta + group * n : -1;
  }
  __device__ __forceinline__ int units_of(int part) const { return this->rows_of(part) * S::heads; }

  /// The next unit of a warpgroup: by four warps and the fifth.
  __device__ __forceinline__ Unit take(int group, Position& next) const {
    barrier_wait(&shared.told[group][next.slot], next.parity);
    const Unit unit = shared.units[group][next.slot];
    sm90::barrier_arrive(&shared.taken[group][next.slot]);
    next.next(kUnits);
    return unit;
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
    static_assert(S::blocks / S::group > S::groups);   // so `ready` is never ahead by two phases, which look like none
  }
  /// Features of the head that are left over from its tiles, if they are few: no tile is worth its time then.
  __device__ __forceinline__ int rest() const {
    const int left = static_cast<int>(this->args.p.vocab % S::tile);
    return left <= 8 ? left : 0;
  }
  __device__ __forceinline__ bool has_tile(int tile) const { return tile * int64_t{S::tile} < this->args.p.vocab - rest(); }
};

}  // namespace vivace::split
