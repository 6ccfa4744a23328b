// The mesh token step: one persistent kernel for 5 to 64 rows, whose CTAs tell each other everything in 16 bytes at a time.
//
// The CTAs are a mesh: CTA (g, j) has head g, the intermediates of group g, and the columns of block j of hidden. Every
// weight is in one of them. One thread streams weights, and keys and values of earlier steps, through a ring in shared
// memory in the order of use; it waits for nobody but the ring. The others multiply and attend:
//
//   qkv      x of block j  -> partial sums of q, k, v of head g -> the CTA of group g that attends the row
//   attend   a few rows of head g                               -> group g
//   out      head g        -> partial sums of the columns of block j -> CTA (row % 16, j), which adds them to the residual
//   gate_up  x             -> 32 intermediates of group g       -> group g
//   down     256 intermediates of group g -> as out
//
// What is exchanged goes through L2 in vectors that are their own flags (mesh_vector.cuh), written by those that have
// summed, and read into registers as wgmma's operand A wants it. The order of every sum depends on nothing but the sizes.
#pragma once

#include "kernels/step/mesh_attention.cuh"
#include "kernels/step/mesh_deal.cuh"
#include "kernels/step/mesh_fresh.cuh"
#include "kernels/step/mesh_load.cuh"
#include "kernels/step/mesh_products.cuh"
#include "kernels/step/mesh_rest.cuh"

namespace vivace::mesh {

template <typename T, bool kProbes>
__device__ __forceinline__ void consume(const Cta& c, int warp, int lane) {
  const StepParams& p = c.args.p;
  const int layers = static_cast<int>(p.layers);
  float x[8];  // the residual stream
  const auto residual = [&] { return Residual<T>(c, warp, opaque(lane), x); };
  const auto fresh = [&] { return Fresh<T>(c, warp, opaque(lane)); };
  const auto attention = [&] { return Attention<T, kProbes>(c, warp, opaque(lane)); };
  const auto products = [&] { return Products<T>(c, warp, opaque(lane)); };
  Position ring;
  int tile = c.cta;  // of the head
  // Half layers, each of which ends with sums for the residual stream, and the head, which begins like the second half of a
  // layer: there is one copy of what they have in common, since code that the instruction cache does not hold takes longer.
#pragma unroll 1
  for (int i = 0;;) {
    const int layer = i / 2;
    const bool is_head = i == 2 * layers;
    if (tile == c.cta) {
      const T* gains = is_head      ? static_cast<const T*>(p.norm)
                       : i % 2 == 0 ? static_cast<const T*>(p.input_norm) + int64_t{layer} * kHidden
                                    : static_cast<const T*>(p.post_norm) + int64_t{layer} * kHidden;
      residual().publish(gains, i, is_head);
    }
    float sum[32];
    if (i % 2 == 0 && !is_head) {
      if (threadIdx.x == 0 && c.has_many_keys()) c.allow(kSomeUnderWay);
      products().qkv(layer, ring);
      if (i == 0) fresh().begin();
      typename Attention<T, kProbes>::Held held;
      attention().hold_first(held, ring);
      fresh().collect(layer);
      sm90::named_barrier_sync(kReady, kConsumers);
      if (threadIdx.x == 0) c.allow(kMostUnderWay);
      attention().run(layer, ring, held);
      if (threadIdx.x == 0) c.allow(c.has_many_keys() ? kSomeUnderWay : kUnderWay);
      products().out(sum, layer, ring);
    } else {
      if (is_head) {
        if (tile == c.cta && c.rest() > 0) sm90::named_barrier_arrive(kLast, kConsumers + kBeside);
        if (!c.has_tile(tile)) return;
      }
      float part[16];
      products().multiply_x(part, is_head, ring);
      if (is_head) {
        products().store(part, tile);
        tile += kCtas;
        continue;
      }
      products().gate(part, layer);
      if (threadIdx.x == 0) c.allow(kUnderWay);
      products().down(sum, layer, ring);
    }
    products().share(sum, i % 2 == 0 ? kOutPhase : kDownPhase);
    if (threadIdx.x == 0 && c.has_many_keys()) c.allow(kUnderWay);
    if (i % 2 == 0) sm90::named_barrier_sync(kUsed, kConsumers);
    ++i;
  }
}

template <typename T, bool kProbes>
__global__ void __launch_bounds__(kThreads, 1) mesh_kernel(const __grid_constant__ Args args) {
  const Cta c(args, step::dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  if (thread == 0) {
    c.shared.allowed = kUnderWay;
    for (int i = 0; i < kStages; ++i) {
      sm90::barrier_init(&c.shared.full[i], 1);
      sm90::barrier_init(&c.shared.empty[i], kWarps);
    }
    if constexpr (kProbes) sm90::barrier_init(&c.shared.attended, kConsumers);
    sm90::barrier_init_fence();
  }
  deal(c);
  __syncthreads();
  if (warp < kWarps) {
    sm90::registers_increase<kConsumerRegisters>();
    consume<T, kProbes>(c, warp, lane);
  } else {
    sm90::registers_decrease<kStreamRegisters>();
    if (warp == kWarps) {
      if (step::elect()) stream(c);
    } else {
      if constexpr (kProbes) ProbeWriter(c, thread - (kThreads - kBeside)).run();
      multiply_rest<T>(c, warp - kWarps - 1, lane);
    }
  }
}

}  // namespace vivace::mesh
