// The split token step: one persistent kernel for many rows, whose CTAs have two roles.
//
// The rows are two parts, more than 128 three or four. While the CTAs that attend read the keys and values of one part in a
// layer, which is all that memory can give, the others multiply for another part: out, gate_up, down, and qkv of the next
// layer. Then the parts change places. So memory does not wait for what the CTAs of a product tell each other, nor those for
// memory. Each role has a thread or two that stream what the step does not write through a ring in shared memory, ahead of
// everything and without a word from anybody: keys and values, or weights, which the parts but the first find in L2.
//
//   part 0   | qkv 0 |     | attention 0 | products 0 | attention 1 | products 1 | ...
//   part 1   |       | qkv 0 |           | attention 0 | products 0 | attention 1 | ...
//
// What CTAs tell each other goes through L2: what is written, then a counter.
#pragma once

#include "kernels/step/split_attention.cuh"
#include "kernels/step/split_courier.cuh"
#include "kernels/step/split_load.cuh"
#include "kernels/step/split_products.cuh"
#include "kernels/step/split_rest.cuh"

namespace vivace::split {

/// A CTA that attends: a warpgroup a row and a head at a time, for each a thread that streams keys and values and a warp
/// that fetches q and sends what comes out.
template <typename T, typename S>
__device__ __forceinline__ void attend(const Cta<S>& cta, int warp, int lane) {
  const AttentionCta<S> c(cta, dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * S::attention_stages; ++i) {
      sm90::barrier_init(&c.shared.full[i % 2][i / 2], 1);
      sm90::barrier_init(&c.shared.empty[i % 2][i / 2], 4);
    }
    for (int i = 0; i < 2 * kUnits; ++i) {
      sm90::barrier_init(&c.shared.told[i % 2][i / 2], 1);
      sm90::barrier_init(&c.shared.taken[i % 2][i / 2], 5 * 32);
    }
    for (int i = 0; i < 4; ++i) {
      sm90::barrier_init(&c.shared.begin[i / 2][i % 2], 32);
      sm90::barrier_init(&c.shared.end[i / 2][i % 2], 128);
    }
    sm90::barrier_init_fence();
  }
  c.read_lengths();
  __syncthreads();
  c.sort();
  __syncthreads();
  if (warp < 8) {
    sm90::registers_increase<S::registers>();
    Attention<T, S>(c, warp / 4, warp % 4, lane).run();
  } else {
    sm90::registers_decrease<S::loader_registers>();
    if (warp < 10 && elect()) stream_keys(c, warp - 8);
    if (warp >= 10) Courier<T, S>(c, warp - 10, lane).run();
  }
}

/// A CTA that multiplies: two warpgroups, one thread that streams weights and one that loads activations.
template <typename T, typename S>
__device__ __forceinline__ void multiply(const Cta<S>& cta, int warp, int lane) {
  const ProductCta<S> c(cta, dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      sm90::barrier_init(&c.shared.full[i], 1);
      sm90::barrier_init(&c.shared.empty[i], 8);
    }
    for (int i = 0; i < S::groups; ++i) {
      sm90::barrier_init(&c.shared.x_full[i], 1);
      sm90::barrier_init(&c.shared.x_empty[i], 8);
    }
    sm90::barrier_init(&c.shared.ready, 1);
    sm90::barrier_init_fence();
  }
  if (warp == 8 && lane < S::parts) c.shared.before[lane] = load_acquire(c.counter(Counters::launches + lane));
  __syncthreads();
  if (warp < 8) {
    sm90::registers_increase<S::registers>();
    Products<T, S>(c, warp / 4, warp % 4, lane).run();
  } else {
    sm90::registers_decrease<S::loader_registers>();
    if (warp == 8 && elect()) stream_weights(c);
    if (warp == 9 && elect()) load_activations(c);
    if (warp >= 10) multiply_rest<T>(c, warp - 10, lane);
  }
}

template <typename T, int kHeads, int kParts>
__global__ void __launch_bounds__(Shape<kHeads, kParts>::threads, 1) split_kernel(const __grid_constant__ Args args) {
  using S = Shape<kHeads, kParts>;
  const Cta<S> c(args);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  if (c.attends) {
    attend<T>(c, warp, lane);
  } else {
    multiply<T>(c, warp, lane);
  }
}

}  // namespace vivace::split
