// The chain's products for sm_80 and newer: mma.sync, cp.async, at most 96 KiB of shared memory.
//
// A CTA makes one tile: kWidth features (the rows of W are the M operand, so a few rows waste nothing) times kN rows. Its
// four warps share out the columns, 32 at a time in turn, and each makes the whole tile of its share; the four are added in
// order at the end. The share of a warp does not depend on the number of rows, so neither does what a row computes. W and x
// pass through shared memory, a ring of kStages stages a thread, by cp.async. A thread copies just the 16 bytes that it will
// read itself, so the ring needs no barrier: row lane / 4 of 8, columns 8 * (lane % 4) ... + 7 of 32. mma wants columns 2 *
// (lane % 4) + {0, 1, 8, 9} of 16; since W and x permute the columns alike, the sum is the same.
#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/step/linear_epilogue.cuh"

namespace vivace::sm80 {

inline constexpr int kLinearWarps = 4;
inline constexpr int kLinearThreads = 32 * kLinearWarps;

template <int kWidth, int kN>
struct LinearTile {
  static constexpr int kWeightVectors = kWidth / 8;  // 16 bytes of a thread in a stage
  static constexpr int kVectors = kWeightVectors + kN / 8;
  static constexpr int kStageBytes = kVectors * kLinearThreads * 16;
  static constexpr int kFit = 48 * 1024 / kStageBytes;  // two CTAs on a multiprocessor of 100 KiB
  static constexpr int kStages = kFit > 8 ? 8 : kFit < 3 ? 3 : kFit;
  static constexpr int kPitch = kWidth + 4;  // floats between rows of a finished tile: no bank conflicts
  static constexpr int kTileBytes = kLinearWarps * kN * kPitch * 4;
  static constexpr int kSmemBytes = kStages * kStageBytes > kTileBytes ? kStages* kStageBytes : kTileBytes;
  static_assert(kSmemBytes <= 99 * 1024);
};

template <typename T, Matrix kMatrix, int kWidth, int kN>
__global__ void __launch_bounds__(kLinearThreads) linear_kernel(const __grid_constant__ LinearArgs args) {
  using Tile = LinearTile<kWidth, kN>;
  using Item = LinearItem<T, kMatrix, kWidth>;
  constexpr int kTiles = kWidth / 16, kUnits = kN / 8;
  constexpr int kItems = (kN * Item::kLanes + kLinearThreads - 1) / kLinearThreads;  // of a thread
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // Tiles of the same weights run beside each other.
  const int tile = static_cast<int>(blockIdx.y), row0 = static_cast<int>(blockIdx.x) * kN;

  extern __shared__ uint4 linear_shared[];
  ptx::grid_dependency_launch();
  const uint32_t queue = ptx::shared_address(linear_shared) + threadIdx.x * 16;
  const auto slot = [&](int stage, int vector) { return queue + (stage * Tile::kVectors + vector) * kLinearThreads * 16; };
  const int chunks = args.k / 32;
  const auto load_weight = [&](int chunk, int stage) {
#pragma unroll
    for (int i = 0; i < Tile::kWeightVectors; ++i) {
      const int row = weight_row_of<kMatrix, kWidth>(args, tile, i * 8 + lane / 4);
      const bool exists = kMatrix != Matrix::kHead || row < args.features;
      const T* from = static_cast<const T*>(args.weight) + int64_t{exists ? row : 0} * args.k + chunk * 32 + lane % 4 * 8;
      ptx::cp_async_16(slot(stage, i), from, exists ? 16 : 0);
    }
  };
  const auto load_x = [&](int chunk, int stage) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int row = row0 + i * 8 + lane / 4;
      const bool exists = row < args.rows;
      const T* from = static_cast<const T*>(args.x) + int64_t{exists ? row : 0} * args.k + chunk * 32 + lane % 4 * 8;
      ptx::cp_async_16(slot(stage, Tile::kWeightVectors + i), from, exists ? 16 : 0);
    }
  };
  // The weights do not depend on the kernel before.
#pragma unroll
  for (int s = 0; s < Tile::kStages; ++s) {
    if (warp + s * kLinearWarps < chunks) load_weight(warp + s * kLinearWarps, s);
  }
  Item items[kItems];
  const auto item_row = [&](int i) { return (static_cast<int>(threadIdx.x) + i * kLinearThreads) / Item::kLanes; };
  const int item_lane = static_cast<int>(threadIdx.x) % Item::kLanes;
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i].load_constants(args, row0 + item_row(i), tile, item_lane);
  ptx::grid_dependency_wait();
#pragma unroll
  for (int s = 0; s < Tile::kStages; ++s) {
    if (warp + s * kLinearWarps < chunks) load_x(warp + s * kLinearWarps, s);
    ptx::cp_async_commit();
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (item_row(i) < kN) items[i].load(args, tile, item_lane);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (item_row(i) < kN) items[i].prepare(args);
  }

  float acc[kTiles][kUnits][4] = {};  // features lane / 4 and + 8 of 16, rows 2 * (lane % 4) + {0, 1} of 8
  int stage = 0;
  for (int chunk = warp; chunk < chunks; chunk += kLinearWarps) {
    ptx::cp_async_wait<Tile::kStages - 1>();
    uint4 x[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) x[i] = ptx::ld_shared_v4(slot(stage, Tile::kWeightVectors + i));
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 lo = ptx::ld_shared_v4(slot(stage, 2 * t)), hi = ptx::ld_shared_v4(slot(stage, 2 * t + 1));
      const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
      for (int i = 0; i < kUnits; ++i) ptx::mma_m16n8k16<T>(acc[t][i], first, x[i].x, x[i].y);
#pragma unroll
      for (int i = 0; i < kUnits; ++i) ptx::mma_m16n8k16<T>(acc[t][i], second, x[i].z, x[i].w);
    }
    const int next = chunk + Tile::kStages * kLinearWarps;
    if (next < chunks) {
      load_weight(next, stage);
      load_x(next, stage);
    }
    ptx::cp_async_commit();
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads the ring any more

  float* sums = reinterpret_cast<float*>(linear_shared);  // (warps, kN, kPitch)
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      float* to = sums + (warp * kN + i * 8 + 2 * (lane % 4)) * Tile::kPitch + t * 16 + lane / 4;
      to[0] = acc[t][i][0];
      to[Tile::kPitch] = acc[t][i][1];
      to[8] = acc[t][i][2];
      to[Tile::kPitch + 8] = acc[t][i][3];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (item_row(i) >= kN) break;  // whole warps
    float v[4] = {};
#pragma unroll
    for (int w = 0; w < kLinearWarps; ++w) {
      const float* from = sums + (w * kN + item_row(i)) * Tile::kPitch + 2 * item_lane;
      const float2 lo = *reinterpret_cast<const float2*>(from);
      const float2 hi = *reinterpret_cast<const float2*>(from + kWidth / 2);
      v[0] += lo.x, v[1] += lo.y, v[2] += hi.x, v[3] += hi.y;
    }
    items[i].store(args, tile, item_lane, v);
  }
}

}  // namespace vivace::sm80
