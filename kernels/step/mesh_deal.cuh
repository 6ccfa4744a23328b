// Which rows a CTA of the mesh step attends.
#pragma once

#include "kernels/step/mesh_parts.cuh"

namespace vivace::mesh {

/// Deals the rows to the 8 CTAs of a group, all of which come to the same: longest first, 8 in a round, of which the longer
/// ones go to those who have less so far. By all threads; the result is there after the next __syncthreads.
__device__ __forceinline__ void deal(const Cta& c) {
  static_assert(kMaxRows <= kThreads);
  const int t = static_cast<int>(threadIdx.x);
  if (t < c.rows) c.shared.lengths[t] = step::old_keys(c.args.p, t);
  __syncthreads();
  if (t < c.rows) {
    const int mine = c.shared.lengths[t];
    int rank = 0;
    for (int r = 0; r < c.rows; ++r) {
      const int other = c.shared.lengths[r];
      rank += other > mine || (other == mine && r < t) ? 1 : 0;
    }
    c.shared.sorted[rank] = t;
  }
  __syncthreads();
  if (t >= 32) return;
  const int block = t % kBlocks;  // a lane of each eight stands for a CTA
  int load = 0, units = 0, stages = 0;
  for (int first = 0; first < c.rows; first += kBlocks) {
    int place = first;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int other = __shfl_sync(~0u, load, b);
      place += other < load || (other == load && b < block) ? 1 : 0;
    }
    if (place >= c.rows) continue;
    const int row = c.shared.sorted[place];
    load += c.shared.lengths[row];
    stages += (c.shared.lengths[row] + 63) / 64;
    if (t == c.block) {
      c.shared.units[units] = {row, max(0, c.args.p.cache_batch_idx[row]), c.shared.lengths[row],
                               step::newest_key(c.args.p, row)};
    }
    ++units;
  }
  if (t == c.block) c.shared.unit_count = units, c.shared.key_stages = stages;
}

}  // namespace vivace::mesh
