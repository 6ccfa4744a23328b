// Attention of few queries over many keys, bound by memory: what counts is bytes in flight and no second launch.
//
// A CTA (4 warps; 2 CTAs a multiprocessor) reads one range of the keys of the batch for one kv head, see decode_plan.cuh:
//
//   warp 0   tiles 0, 4, 8, ... of a run     ring of its own, filled ahead across runs:  |t t t|
//   warp 1   tiles 1, 5, 9, ...              S^T = K Q^T, softmax, O^T += V^T P^T          decode_tile.cuh
//   ...                                      nothing is shared until the run's end         decode_merge.cuh
//
// Neighbouring CTAs take the same keys of neighbouring heads, which lie beside each other in (row, position, head, dim)
// caches.
#pragma once

#include "kernels/attention/decode_load.cuh"
#include "kernels/attention/decode_merge.cuh"
#include "kernels/attention/decode_plan.cuh"
#include "kernels/attention/decode_tile.cuh"
#include "kernels/attention/splits.h"

namespace vivace {

/// Where the parts of a CTA's shared memory lie, in bytes from a multiple of 1024.
template <typename Copy>
struct DecodeShared {
  static constexpr int kWarps = Copy::kWarps;
  static constexpr int kRing = kWarps * Copy::kStages * Copy::Layout::kStageBytes;
  static constexpr int kBarriers = kRing;                                  // (warp, stage) of 8
  static constexpr int kScratch = kBarriers + 8 * kWarps * Copy::kStages;  // (warp) of 4
  static constexpr int kBuffer = kScratch + 32;                            // of the merge; then the plan

  static constexpr int bytes(int buffer_floats, int plan_bytes) {
    return 1024 + kBuffer + 4 * buffer_floats + plan_bytes;  // 1024: to align
  }
};

template <typename T, int kDim, int kTiles, typename Copy>
__global__ void __launch_bounds__(32 * Copy::kWarps, Copy::kWarps == 8 ? 1 : kDecodeCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeArgs args, const __grid_constant__ typename Copy::Maps maps) {
  constexpr int kKeys = decode_keys(kDim), kWarps = Copy::kWarps, kThreads = 32 * kWarps;
  using Shared = DecodeShared<Copy>;
  using State = DecodeState<T, kKeys, kDim, kTiles>;
  using Merge = DecodeMerge<T, kDim, kTiles, kWarps>;
  const AttentionParams& p = args.params;
  extern __shared__ uint8_t shared_memory[];
  const int warp = threadIdx.x / 32;

  const uint32_t misaligned = ptx::shared_address(shared_memory) & 1023u;
  uint8_t* shared = shared_memory + (misaligned == 0 ? 0 : 1024 - misaligned);
  float* buffer = reinterpret_cast<float*>(shared + Shared::kBuffer);
  Copy copy(args, maps, ptx::shared_address(shared) + warp * Copy::kStages * Copy::Layout::kStageBytes,
            reinterpret_cast<uint64_t*>(shared + Shared::kBarriers) + warp * Copy::kStages);

  const int range = static_cast<int>(blockIdx.x) / args.units;
  const int unit_index = static_cast<int>(blockIdx.x) - range * args.units;
  const int head_kv = unit_index / args.row_tiles, row0 = (unit_index - head_kv * args.row_tiles) * args.rows;
  const int head0 = head_kv * args.group;

  ptx::grid_dependency_wait();
  const DecodePlan<kKeys, kThreads> plan(args, range, buffer + Merge::buffer_floats(args.rows),
                                         reinterpret_cast<int*>(shared + Shared::kScratch));
  ptx::grid_dependency_launch();

  // Tiles of this warp that are under way, and the next to copy: ahead of the one that is computed, across runs. A run of
  // few tiles may hold none of this warp's.
  DecodeRun ahead;
  int ahead_granule = plan.granule, ahead_tile = 0, filled = 0, under_way = 0;
  bool more = true;

  DecodeRun run, shared_entry;  // shared_entry: whose last part is this CTA's, but not its first: merged at the end
  Sequence seq;
  DecodeRows unit{row0, 0, args.group, args.by_group};
  DecodeQueries<T, kDim, kTiles> queries;
  State state;
  int granule = plan.granule, tile = 0, stage = 0, full_begin = 0, full_end = 0;
#pragma unroll 1
  for (;;) {
    // Every step appears once: the kernel starts cold, and what it pays for is the length of its code.
#pragma unroll 1
    while (more && under_way < Copy::kStages) {
      if (ahead_tile >= ahead.end) {
        if (ahead_granule >= plan.end) {
          more = false;
          break;
        }
        const DecodeEntry entry = plan.take(ahead, ahead_granule);
        const int batch = args.first_entry + ahead.entry;
        copy.begin(entry, batch, head_kv);
        ahead_tile = ahead.tile + warp;
        if (p.cu_seqlens_q != nullptr && row0 >= (p.cu_seqlens_q[batch + 1] - p.cu_seqlens_q[batch]) * args.group) {
          ahead_tile = ahead.end;  // none of this unit's queries
        }
        continue;
      }
      copy.issue(filled, ahead, ahead_tile);
      copy.commit();
      ahead_tile += kWarps;
      ++under_way;
      filled = filled + 1 == Copy::kStages ? 0 : filled + 1;
    }

    if (tile >= run.end) {
      const Merge merge(args, seq, unit, head0);
      bool merges = false;
      if (unit.rows > 0) {
        merge.finish(plan, run, unit_index, state, buffer);
        if (run.parts > 1 && run.part == run.part0 + run.parts - 1) {
          merges = run.part0 >= plan.first_part();  // then this CTA has all parts
          if (!merges) shared_entry = run;
        }
      }
      bool last = false;
      if (!merges && granule >= plan.end) {
        if (shared_entry.parts == 0) break;
        merges = last = true;
        run = shared_entry;
      }
      if (merges) {
        seq = Sequence(p, args.first_entry + run.entry);
        unit.rows = min(args.rows, seq.q_rows * args.group - row0);
        merge.merge_parts(plan, run, unit_index);
        if (last) break;
        unit.rows = 0;  // done with this run
        continue;
      }
      plan.take(run, granule);
      plan.find_parts(run);
      seq = Sequence(p, args.first_entry + run.entry);
      unit.rows = min(args.rows, seq.q_rows * args.group - row0);
      if (unit.rows <= 0) {
        if (run.part == run.part0) merge.clear_probe();
        tile = run.end;
        continue;
      }
      queries.load(p, seq, unit, head0);
      state.clear();
      const int query0 = unit.query(0), queries_end = unit.query(unit.rows - 1) + 1;
      const KeyBlocks<kKeys> blocks(seq, args.window, query0, queries_end - query0);
      full_begin = blocks.full_begin;
      full_end = queries_end > seq.queries ? 0 : blocks.full_end;  // rows past the queries see nothing
      tile = run.tile + warp;
      continue;
    }

    copy.wait(stage, under_way);
    state.add(queries, copy.stage_address(stage), tile * kKeys, tile < full_begin || tile >= full_end, args, seq, unit,
              head0);
    __syncwarp();  // all lanes have read the stage
    stage = stage + 1 == Copy::kStages ? 0 : stage + 1;
    --under_way;
    tile += kWarps;
  }
}

}  // namespace vivace
