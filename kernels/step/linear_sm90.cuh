// The chain's products for Hopper: TMA, wgmma, clusters.
//
// A CTA makes kTiles tiles of 64 features (the rows of W are the M operand: a warpgroup a tile, so that few rows waste
// little) times kN rows, over 1 / kSplit of the columns; the kSplit CTAs of a cluster share the columns. Each 8 rows of the
// result belong to one of them: the others send it their sums (st.async: no barrier but the owner's), and it adds them in
// the order of the columns. Neither the shares nor the order depend on the number of rows, so neither does what a row
// computes.
//
//  warp 4 * kTiles   W of the first kStages blocks of 64 columns | wait for the kernel before | x of them | further blocks
//  warpgroups        constants of the epilogue                   | wait | residual or sums of squares | wgmma | exchange |
//  store
//
// The weights do not depend on the kernel before, so they are under way, or there, when it ends.
#pragma once

#include <cuda.h>

#include "kernels/common/cluster.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/tma.cuh"
#include "kernels/common/wgmma.cuh"
#include "kernels/step/linear_epilogue.cuh"

namespace vivace::sm90 {

template <typename T_, Matrix kMatrix_, int kN_, int kTiles_, int kSplit_, int kStages_>
struct LinearTraits {
  using T = T_;
  static constexpr Matrix kMatrix = kMatrix_;
  static constexpr int kN = kN_, kTiles = kTiles_, kSplit = kSplit_, kStages = kStages_;
  static constexpr int kThreads = kTiles * 128 + 32;
  static constexpr int kUnits = kN / 8;                          // eights of rows
  static constexpr int kOwned = (kUnits + kSplit - 1) / kSplit;  // of one CTA
  static constexpr int kSenders = kSplit > 1 ? kSplit - 1 : 1;
  static constexpr int kWeightBytes = kTiles * 64 * 128, kXBytes = kN * 128;  // of a block of 64 columns
  static constexpr int kStageBytes = kWeightBytes + kXBytes;
};

/// Behind the ring: up to kStages stages of kStageBytes, as many as the CTA has blocks.
template <typename Traits>
struct LinearSmem {
  // Sums of other CTAs, as their accumulators hold them; at the end [0] takes finished tiles, (8 rows, 64 features)
  alignas(128) float4 sums[Traits::kSenders][Traits::kOwned][Traits::kTiles][128];
  uint64_t full[Traits::kStages], empty[Traits::kStages], received;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    linear_kernel(const __grid_constant__ LinearArgs args, const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ CUtensorMap x_map) {
  using T = typename Traits::T;
  constexpr Matrix kMatrix = Traits::kMatrix;
  constexpr int kN = Traits::kN, kTiles = Traits::kTiles, kSplit = Traits::kSplit, kStages = Traits::kStages;
  constexpr int kUnits = Traits::kUnits, kOwned = Traits::kOwned;
  using Item = LinearItem<T, kMatrix, 64>;
  extern __shared__ __align__(1024) uint8_t ring[];

  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = kSplit > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int row0 = static_cast<int>(blockIdx.z) * kN;
  const int units = min(kUnits, (args.rows - row0 + 7) / 8);
  const int blocks = args.k / 64 / kSplit;  // of this CTA
  const int first = rank * blocks;
  const int stages = min(kStages, blocks);
  auto& smem = *reinterpret_cast<LinearSmem<Traits>*>(ring + stages * Traits::kStageBytes);

  if (threadIdx.x == kTiles * 128) {
    for (int s = 0; s < stages; ++s) {
      barrier_init(&smem.full[s], 1);
      barrier_init(&smem.empty[s], 4 * kTiles);
    }
    barrier_init(&smem.received, 1);
    barrier_init_fence();
    if (kSplit > 1 && rank < units) {
      const int owned = (units - rank + kSplit - 1) / kSplit;
      barrier_expect(&smem.received, owned * (kSplit - 1) * kTiles * 2048);
    }
  }
  __syncthreads();
  if constexpr (kSplit > 1) cluster_arrive();  // this CTA's barriers are there

  if (warp == kTiles * 4) {
    const auto load_weight = [&](int block, int s) {
      barrier_expect(&smem.full[s], Traits::kStageBytes);
      const int column = (first + block) * 64;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int tile = static_cast<int>(blockIdx.y) * kTiles + t;
        uint8_t* to = ring + s * Traits::kStageBytes + t * 8192;
        if constexpr (kMatrix == Matrix::kGateUp) {
          const int row = args.weight_row + tile * 32;
          tma_load_2d(to, &weight_map, &smem.full[s], column, row, kEvictFirst);
          tma_load_2d(to + 4096, &weight_map, &smem.full[s], column, row + args.features / 2, kEvictFirst);
        } else {
          tma_load_2d(to, &weight_map, &smem.full[s], column, args.weight_row + tile * 64, kEvictFirst);
        }
      }
    };
    const auto load_x = [&](int block, int s) {
      tma_load_2d(ring + s * Traits::kStageBytes + Traits::kWeightBytes, &x_map, &smem.full[s], (first + block) * 64, row0,
                  kEvictLast);
    };
    if (lane == 0) {
      tma_prefetch_map(&weight_map);
      tma_prefetch_map(&x_map);
      for (int b = 0; b < stages; ++b) load_weight(b, b);
      ptx::grid_dependency_launch();
      ptx::grid_dependency_wait();
      for (int b = 0; b < stages; ++b) load_x(b, b);
      for (int b = stages, s = 0, parity = 0; b < blocks; ++b) {
        barrier_wait(&smem.empty[s], parity);
        load_weight(b, s);
        load_x(b, s);
        if (++s == stages) s = 0, parity ^= 1;
      }
    }
    if constexpr (kSplit > 1) cluster_wait();
    return;
  }

  const int group = warp / 4, thread = static_cast<int>(threadIdx.x) % 128;
  const int tile = static_cast<int>(blockIdx.y) * kTiles + group;
  const int item_lane = thread % Item::kLanes;
  const auto item_row = [&](int i) { return row0 + (i * kSplit + rank) * 8 + thread / Item::kLanes; };
  Item items[kOwned];
#pragma unroll
  for (int i = 0; i < kOwned; ++i) items[i].load_constants(args, item_row(i), tile, item_lane);
  ptx::grid_dependency_wait();
#pragma unroll
  for (int i = 0; i < kOwned; ++i) items[i].load(args, tile, item_lane);
#pragma unroll
  for (int i = 0; i < kOwned; ++i) items[i].prepare(args);

  float acc[kN / 2];  // [4 * u + ...]: features lane / 4 (+ 8) of the warp's 16, rows 8 * u + 2 * (lane % 4) + {0, 1}
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0.0f;
  wgmma_hold(acc);
  for (int b = 0, s = 0, before = 0, parity = 0; b < blocks; ++b) {
    barrier_wait(&smem.full[s], parity);
    const uint32_t stage = smem_address(ring + s * Traits::kStageBytes);
    const uint64_t w = wgmma_descriptor(stage + group * 8192, 0);
    const uint64_t x = wgmma_descriptor(stage + Traits::kWeightBytes, 0);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Wgmma<T, kN>::ss(acc, w + k * 2, x + k * 2, b + k > 0);  // 32 bytes further
    wgmma_commit();
    if (b > 0) {
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(&smem.empty[before]);
    }
    before = s;
    if (++s == stages) s = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  wgmma_hold(acc);

  if constexpr (kSplit > 1) {
    cluster_wait();
    // Own place among the senders of another CTA: the ranks without the receiver's.
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int owner = u % kSplit;
      if (u < units && owner != rank) {
        const uint32_t to = smem_address(&smem.sums[rank - (rank > owner)][u / kSplit][group][thread]);
        store_async(cluster_address(to, owner), acc[4 * u], acc[4 * u + 1], acc[4 * u + 2], acc[4 * u + 3],
                    cluster_address(smem_address(&smem.received), owner));
      }
    }
    if (rank >= units) return;
    barrier_wait(&smem.received, 0);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u < units && u % kSplit == rank) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int sender = 0; sender < kSplit; ++sender) {
          const float4 part = sender == rank ? make_float4(acc[4 * u], acc[4 * u + 1], acc[4 * u + 2], acc[4 * u + 3])
                                             : smem.sums[sender - (sender > rank)][u / kSplit][group][thread];
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        acc[4 * u] = sum.x, acc[4 * u + 1] = sum.y, acc[4 * u + 2] = sum.z, acc[4 * u + 3] = sum.w;
      }
    }
    named_barrier_sync(1 + group, 128);  // sums[0] has been read
  }

  // Through shared memory, so that 16 lanes have a row: (8, 64) floats, feature f of row r at f ^ 8 * (r / 2): no conflicts.
  const auto finished = [&](int i) { return reinterpret_cast<float*>(smem.sums[0][i][group]); };
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (u < units && u % kSplit == rank) {
      const int row = 2 * (lane % 4), feature = (warp % 4 * 16 + lane / 4) ^ (8 * (lane % 4));
      float* to = finished(u / kSplit) + row * 64;
      to[feature] = acc[4 * u];
      to[64 + feature] = acc[4 * u + 1];
      to[feature ^ 8] = acc[4 * u + 2];
      to[64 + (feature ^ 8)] = acc[4 * u + 3];
    }
  }
  named_barrier_sync(1 + group, 128);
  float v[kOwned][4];
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    const int row = thread / Item::kLanes;
    const float* from = finished(i) + row * 64;
    const int feature = (2 * item_lane) ^ (8 * (row / 2));
    const float2 lo = *reinterpret_cast<const float2*>(from + feature);
    const float2 hi = *reinterpret_cast<const float2*>(from + (feature ^ 32));
    v[i][0] = lo.x, v[i][1] = lo.y, v[i][2] = hi.x, v[i][3] = hi.y;
  }
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    if (i * kSplit + rank < units) items[i].store(args, tile, item_lane, v[i]);
  }
}

}  // namespace vivace::sm90
