// The consumers of the persistent step: a layer's phases in their order.
#pragma once

#include "kernels/step/persistent_attention.cuh"
#include "kernels/step/persistent_exchange.cuh"
#include "kernels/step/persistent_product.cuh"

namespace vivace::step {

/// The head, whose weights are in registers before the inputs come, but for the ninth tile's and the tenth's.
template <int kHeads, int kRows>
__device__ __forceinline__ void logits(Worker<kHeads, kRows>& self) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int tiles = static_cast<int>((self.p.vocab + 7) / 8);
  int tile = self.cta;
  do {
    const int n = min(S::head_tiles, (tiles - tile + S::ctas - 1) / S::ctas);
    TileWeights w;
    // Stages past the n-th hold old weights, whose products nobody reads.
#pragma unroll 1
    for (int i = 0; i < n; ++i) self.ring.wait_full(i);
    __syncwarp();
    const uint32_t bits = load_weights<0, 4>(self, w);
    self.ring.release_some(self.lane, min(n, 8), bits & self.zero);
    if (tile == self.cta) {
      receive_inputs(self, M::x_down);
    } else {
      self.synchronize();  // the sums before have been read
    }
    multiply<S::row_b>(self, w, self.sums_b);
    if (n > 8) {
      PairWeights<1> more;
      self.ring.release_some(self.lane, n - 8, load_weights<0, 1>(self, more) & self.zero);
      multiply<S::row_a>(self, more, self.sums_a);
    }
    self.synchronize();
#pragma unroll 1
    for (int row = self.warp; row < self.rows; row += S::warps) {
      const float* sums = self.sums_b + row * S::row_b;
      const float scale = inverse_rms(self, sums);
      float* to = self.p.logits + row * self.p.vocab;
      auto store = [&](int output, float sum) {
        const int at = 8 * (tile + output / 8 * S::ctas) + output % 8;
        if (output / 8 < n && at < self.p.vocab) to[at] = sum * scale;
      };
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        store(self.lane + 32 * side, sum_over_warps<S, S::row_b>(sums + self.lane + 32 * side));
      }
      if (n > 8) store(64 + self.lane % 16, sum_over_warps<S, S::row_a>(self.sums_a + row * S::row_a + self.lane % 16));
    }
    tile += S::head_tiles * S::ctas;
  } while (tile < tiles);
}

template <int kHeads, int kRows>
__device__ __forceinline__ void consume(Worker<kHeads, kRows>& self, uint64_t* attended) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  ptx::grid_dependency_wait();
  // Three trips to memory: rows' requests and lengths; tokens and rotary tables; embeddings.
  int64_t request[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) request[r] = r < self.rows ? self.p.row_request[r] : 0;
  const int layers = static_cast<int>(self.p.layers);
  uint32_t* counter = self.template mailbox<uint32_t>(M::counter);
  const uint32_t step = *const_cast<volatile uint32_t*>(counter);
  self.tag = step * static_cast<uint32_t>(layers + 1);
#pragma unroll
  for (int r = 0; r < kRows; ++r) self.lengths[r] = r < self.rows ? cache_row(self.p, r).length : 0;
  int64_t token[kRows], position[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t q = clamp_index(request[r], self.p.requests);
    token[r] = r < self.rows ? self.p.tokens[q] : 0;
    position[r] = r < self.rows ? self.p.positions[q] : 0;
  }
  CacheRow cached[Worker<kHeads, kRows>::kWarpRows];  // of the rows that this warp finishes
#pragma unroll
  for (int i = 0; i < Worker<kHeads, kRows>::kWarpRows; ++i) {
    const int row = self.warp + i * S::warps;
    cached[i] = CacheRow{0, -1, false};
    if (row < self.rows) {
      cached[i] = cache_row(self.p, row);
      if (!cached[i].writes) cached[i].row = -1;
      const int64_t at =
          clamp_index(self.p.cache_seqlens[row], self.p.rotary_positions) * 32 + 4 * self.part + self.lane % 4;
      const bool fp32 = self.p.rotary_dtype == DType::kFloat32;
      const void* table = self.lane < 4 ? self.p.rotary_cos : self.p.rotary_sin;
      const float value = fp32 ? static_cast<const float*>(table)[at] : to_float(static_cast<const bf16*>(table)[at]);
      if (self.lane < 8) self.rotary[row * 8 + self.lane] = value;
    }
  }
  embed(self, token, position);
  const int own = 8 * self.cta + 2 * (self.lane % 4);  // of the residuals, the two that this lane of warp 0 finishes
  const bf16* input_norm = static_cast<const bf16*>(self.p.input_norm) + own;
  const bf16* post_norm = static_cast<const bf16*>(self.p.post_norm) + own;
  const bf16* final_norm = static_cast<const bf16*>(self.p.norm) + own;

#pragma unroll 1
  for (int layer = 0; layer < layers; ++layer) {
    // Long before they are used: these come from memory.
    const uint32_t gain_post = *reinterpret_cast<const uint32_t*>(post_norm + layer * S::hidden);
    const uint32_t gain_next =
        *reinterpret_cast<const uint32_t*>(layer + 1 < layers ? input_norm + (layer + 1) * S::hidden : final_norm);
    {
      QkvWeights w;
      self.template fetch<3>([&] { return load_weights(self, w); });
      if (layer > 0) receive_inputs(self, M::x_down);
      ++self.tag;
      multiply(self, w);
    }
    self.synchronize();
    uint32_t words[Worker<kHeads, kRows>::kWarpRows];
    send_heads(self, words);
    attend(self, layer);
    self.synchronize();
    send_part(self, layer);
    append(self, layer, cached, words);
    TileWeights gate_up;
    {
      OutWeights w;
      self.template fetch<1>([&] { return load_weights(self, w); });
      self.template fetch<2 * S::early_pairs>([&] { return load_weights<0, S::early_pairs>(self, gate_up); });
      receive_parts(self, layer);
      multiply(self, w);
      if (layer + 1 == layers && self.probes != nullptr) sm90::barrier_arrive(attended);
    }
    self.synchronize();
    send_residual<S::row_a>(self, self.sums_a, M::x_out, gain_post);
    self.template fetch<8 - 2 * S::early_pairs>([&] { return load_weights<S::early_pairs, 4>(self, gate_up); });
    receive_inputs(self, M::x_out);
    multiply<S::row_b>(self, gate_up, self.sums_b);
    self.synchronize();
    send_gated(self);
    {
      DownWeights w;
      self.template fetch<4>([&] { return load_weights(self, w); });
      float d[4][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half < S::passes) receive_gated(self, half);
        multiply(self, w, half, d);
        __syncwarp();
      }
      store_down(self, d);
    }
    self.synchronize();
    send_residual<S::row_c>(self, self.sums_c, M::x_down, gain_next);
  }
  logits(self);
  // Every CTA has read the counter: it has been heard of since. It restarts before sequence numbers could come to 0.
  if (self.cta == 0 && threadIdx.x == 0) *counter = (step + 1) & 0xffffff;
}

}  // namespace vivace::step
