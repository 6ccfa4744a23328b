// Attention forward for Hopper (sm_90a): FlashAttention (arXiv 2205.14135, 2307.08691) with warp specialisation and
// asynchronous matrix products as in FlashAttention-3 (arXiv 2407.08608). docs/kernels.md has a picture.
//
// A block owns an SM and works through tiles of 64 queries a consumer of one head. Of the first warpgroup, one warp loads Q
// and K and one V by TMA into rings (forward_sm90_load.cuh); the other warpgroups (consumers, forward_sm90_consumer.cuh)
// hold 64 query rows each, with scores and output in registers:
//
//   S(n) = Q K(n)ᵀ is issued, then O += P(n+1) V(n+1); the softmax of S(n) runs while the tensor cores do what the other
//   consumers issue, in turns that named barriers pass, or as they come.
//
// Keys are walked from the last block to the first, so that masked blocks (sequence end, diagonal) come first.
// Tiles (forward_sm90_shape.cuh):
//
//   head_dim | rows x keys    | KV stages, Q buffers | shared memory, KiB        | S + P + O, registers a thread
//   <= 64    | 64 to 256 x 64 | 6, 2                 | to 64 Q + 96 KV + 32 O    | 32 + 16 + 32  = 80 of 112 and more
//     long     192 x 128      | 3, 2                 | 48 Q + 96 KV + 24 O       | 64 + 32 + 32  = 128 of 160
//   <= 128   | 192 x 64       | 4, 1 (or 2, no O)    | 48 Q + 128 KV + 48 O      | 32 + 16 + 64  = 112 of 160
//     short    128 x 128      | 2, 2                 | 64 Q + 128 KV + 32 O      | 64 + 32 + 64  = 160 of 232
//   <= 192   | 128 x 80       | 2, 2                 | 96 Q + 120 KV             | 40 + 20 + 96  = 156 of 240
//   <= 256   | 128 x 80       | 2, 1                 | 64 Q + 160 KV             | 40 + 20 + 128 = 188 of 240
//
// In a block that no row sees in part, maxima are not computed: exponentials are relative to the maximum so far, and only
// where a thread's add up to more than 2^8 is the block looked at again, and the output rescaled. bf16 and fp16
// probabilities keep their relative precision up to there.
#pragma once

#include "kernels/attention/forward_sm90_consumer.cuh"
#include "kernels/attention/forward_sm90_load.cuh"
#include "kernels/attention/forward_sm90_redo.cuh"

namespace vivace::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::threads, 1)
    forward_sm90_kernel(const __grid_constant__ ForwardArgs args, const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
                        const __grid_constant__ CUtensorMap o_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t raw_smem[];
  auto& smem = *reinterpret_cast<ForwardSmem<Traits>*>(raw_smem);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map);
    tma_prefetch_map(&k_map);
    tma_prefetch_map(&v_map);
    for (int i = 0; i < Traits::q_stages; ++i) {
      barrier_init(&smem.q_full[i], Traits::consumers);           // lanes of the warp that loads it
      barrier_init(&smem.q_empty[i], 4 * Traits::consumers + 1);  // and the warp that loads V
    }
    for (int i = 0; i < Traits::stages; ++i) {
      barrier_init(&smem.k_full[i], 1);
      barrier_init(&smem.v_full[i], 1);
      barrier_init(&smem.k_empty[i], 4 * Traits::consumers);
      barrier_init(&smem.v_empty[i], 4 * Traits::consumers);
    }
    barrier_init(&smem.redo_full, 1);
    for (int i = 0; i < kBits / 32; ++i) smem.bad_tiles[i] = 0;
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<Traits::producer_registers>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // from lane 0: uniform, to the compiler
    if (warp == 0) {
      produce_qk<Traits>(smem, args, &q_map, &k_map);
    } else if (warp == 1) {
      produce_v<Traits>(smem, args, &v_map);
    } else if constexpr (Traits::masked) {
      store_empty_tiles<Traits>(args);
    }
  } else {
    registers_increase<Traits::consumer_registers>();
    Consumer<Traits> consumer{smem, args, &q_map, &k_map, &v_map, &o_map};
    consumer.run();
    if constexpr (Traits::masked) Redo<Traits>{consumer, smem, args}.run();
    if (consumer.leads()) tma_store_wait_read();  // shared memory must live until the last store has read it
  }
#endif
}

}  // namespace vivace::sm90
