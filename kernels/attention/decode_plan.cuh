// Which keys a CTA of attention_decode reads: decided on the device from the real lengths, so that a captured launch serves
// all lengths. The visible keys of a batch entry, in tiles of kKeys, lie behind those of the entry before; that sequence is
// cut into granules and each range of the grid takes as many neighbouring granules as the others:
//  - balanced (the default): a granule is a tile. A range's first and last entries may be shared with its neighbours.
//  - fixed (num_splits, split_keys): a granule is a piece of one entry that depends on nothing but that entry.
// An entry that one CTA reads alone is finished there; the parts of others are merged as decode_merge.cuh says.
#pragma once

#include <cstdint>

#include "kernels/attention/mask.cuh"
#include "kernels/attention/sequence.cuh"

namespace vivace {

struct DecodeArgs {
  AttentionParams params;
  Window window;
  FastDivmod page_size;
  int first_entry;  // of this launch, of the batch
  int entries;      // at most kDecodeEntries
  int group;        // query heads of a kv head
  FastDivmod by_group;
  int rows;  // query rows of a CTA
  int row_tiles;
  int units;  // heads_kv * row_tiles
  int ranges;
  int small_ranges;  // used instead where there is so little work that one CTA a multiprocessor does it
  int small_tiles;   // up to so many tiles of such a range
  int split_tiles;   // fixed: tiles of a piece; 0: by num_splits
  bool fixed;
  uint64_t launch;  // number of this launch, see decode_merge.cuh
  void* packets;
};

/// Batch entries of one launch: what the plan keeps of them lies in shared memory.
inline constexpr int kDecodeEntries = 256;

/// What copying the keys of a batch entry needs to know.
struct DecodeEntry {
  int begin, end;  // tiles of keys that some query sees
  int row;         // of the cache; of the packed keys, where they are of variable length
  int keys;        // n_k
};

/// Neighbouring tiles [tile, end) of one batch entry, which one CTA takes.
struct DecodeRun {
  int entry = -1;
  int tile = 0, end = 0;
  int parts = 0, part0 = 0;  // the entry's partial results: of range or piece part0 ... part0 + parts - 1; parts <= 1: whole
  int part = 0;              // this one
};

/// The granules of all entries, and this CTA's share.
template <int kKeys, int kThreads>
struct DecodePlan {
  const DecodeArgs& args;
  DecodeEntry* entries;  // shared
  int* prefix;           // shared, (entries + 1): granules before an entry
  int range;
  int per;           // granules of a range
  int granule, end;  // this CTA's

  static constexpr int shared_bytes(int entries) { return entries * 20 + 4; }

  __device__ __forceinline__ int piece(int tiles) const {
    if (args.split_tiles > 0) return args.split_tiles;
    const int splits = static_cast<int>(args.params.num_splits);
    return max((tiles + splits - 1) / splits, 1);
  }

  /// memory: shared, shared_bytes(); scratch: shared, kThreads / 32 ints.
  __device__ __forceinline__ DecodePlan(const DecodeArgs& a, int r, void* memory, int* scratch)
      : args(a), entries(static_cast<DecodeEntry*>(memory)), prefix(reinterpret_cast<int*>(entries + a.entries)), range(r) {
    constexpr int kWarps = kThreads / 32;
    const AttentionParams& p = args.params;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int total = 0;
    if (threadIdx.x == 0) prefix[0] = 0;
#pragma unroll 1
    for (int first = 0; first < args.entries; first += kThreads) {
      const int entry = first + static_cast<int>(threadIdx.x);
      int count = 0;
      if (entry < args.entries) {
        const Sequence seq(p, args.first_entry + entry);
        const KeyBlocks<kKeys> blocks(seq, args.window, 0, seq.queries);
        const bool packed = !p.has_cache && p.cu_seqlens_k != nullptr;
        const int row = packed                         ? p.cu_seqlens_k[seq.batch]
                        : p.cache_batch_idx != nullptr ? max(p.cache_batch_idx[seq.batch], 0)
                                                       : seq.batch;
        entries[entry] = {blocks.begin, blocks.end, row, seq.keys};
        count = blocks.end - blocks.begin;
        if (args.fixed) {
          const int size = piece(count);
          count = (count + size - 1) / size;
        }
        count = max(count, 1);  // an entry without keys has outputs all the same
      }
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, count, distance);
        if (lane >= distance) count += other;
      }
      if (lane == 31) scratch[warp] = count;
      __syncthreads();
      int before = total;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
      }
      if (entry < args.entries) prefix[entry + 1] = before + count;
      __syncthreads();
    }
    int ranges = args.ranges;
    if (!args.fixed && total <= args.small_tiles * args.small_ranges) ranges = args.small_ranges;
    per = max((total + ranges - 1) / ranges, args.fixed ? 1 : kWarps);
    granule = min(range * per, total);
    end = min(granule + per, total);
  }

  /// Moves `run` on to what lies at granule `at`, and `at` behind it. `run.entry`: where to begin looking, -1 for anywhere.
  __device__ __forceinline__ DecodeEntry take(DecodeRun& run, int& at) const {
    if (run.entry < 0) {
      int low = 0, high = args.entries - 1;  // the last entry with prefix <= at
#pragma unroll 1
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (prefix[middle] <= at) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      run.entry = low;
    } else if (prefix[run.entry + 1] <= at) {
      ++run.entry;  // every entry has a granule
    }
    const int first = prefix[run.entry], last = prefix[run.entry + 1];
    const DecodeEntry entry = entries[run.entry];
    if (args.fixed) {
      const int size = piece(entry.end - entry.begin);
      run.tile = entry.begin + (at - first) * size;
      run.end = min(run.tile + size, entry.end);
      run.part = at++;
    } else {
      const int stop = min(end, last);
      run.tile = entry.begin + at - first;
      run.end = min(entry.begin + stop - first, entry.end);
      run.part = range;
      at = stop;
    }
    return entry;
  }

  /// Fills in the parts of a run that was taken.
  __device__ __forceinline__ void find_parts(DecodeRun& run) const {
    const int first = prefix[run.entry], last = prefix[run.entry + 1];
    run.part0 = args.fixed ? first : first >= granule ? range : first / per;
    run.parts = (args.fixed ? last : last <= end ? range + 1 : (last - 1) / per + 1) - run.part0;
  }

  /// The first part that is this CTA's.
  __device__ __forceinline__ int first_part() const { return args.fixed ? granule : range; }

  /// Where a part of a run lies among the packets of this unit. A range's last entry may go on in the next range, its first
  /// may have begun in the one before: one slot for each, so that the parts of an entry lie at s, s + 1, s + 3, s + 5, ...
  __device__ __forceinline__ int slot(const DecodeRun& run, int part) const {
    return args.fixed ? part : 2 * part + (part == run.part0 ? 1 : 0);
  }
};

}  // namespace vivace
