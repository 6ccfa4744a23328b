// What the CTAs of the persistent step send each other, but for attention: inputs, heads, residuals, gated values.
#pragma once

#include "kernels/step/persistent_keys.cuh"
#include "kernels/step/persistent_worker.cuh"
#include "kernels/step/silu.cuh"

namespace vivace::step {

/// Packets of inputs, lane l with inputs 4 * l ... 4 * l + 3 of this warp's 128, to staging; their sums of squares stay with
/// the lane until a product sums them.
template <int kHeads, int kRows>
__device__ __forceinline__ void stage_inputs(Worker<kHeads, kRows>& self, const uint4 (&v)[kRows]) {
  const int at = staged(2 * self.lane);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    self.staging[r * 64 + at] = v[r].x;
    self.staging[r * 64 + at + 4] = v[r].y;
    self.squares[r] = __uint_as_float(v[r].z);
  }
  __syncwarp();
}

template <int kHeads, int kRows>
__device__ __forceinline__ void receive_inputs(Worker<kHeads, kRows>& self, size_t offset) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  uint4 v[kRows];
  receive(
      v, self.template mailbox<const uint4>(offset) + self.warp * 32 + self.lane, self.tag,
      [](int r) { return r * S::ctas * M::x_packets; }, [&](int r) { return r < self.rows; });
  stage_inputs(self, v);
}

/// The first layer's inputs, without an exchange: embeddings, as packets would bring them. Sets this CTA's residuals.
template <int kHeads, int kRows>
__device__ __forceinline__ void embed(Worker<kHeads, kRows>& self, const int64_t (&token)[kRows],
                                      const int64_t (&place)[kRows]) {
  using S = PersistentShape<kHeads, kRows>;
  const bf16* speech_emb = static_cast<const bf16*>(self.p.speech_emb);
  const bf16* pos_emb = static_cast<const bf16*>(self.p.speech_pos_emb);
  const bf16* gain = static_cast<const bf16*>(self.p.input_norm);
  uint4 v[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    v[r] = uint4{};
    if (r >= self.rows) continue;
    const int64_t speech = clamp_index(token[r], self.p.speech_tokens) * S::hidden;
    const int64_t position = clamp_index(place[r], self.p.speech_positions) * S::hidden;
    auto value = [&](int i) {
      return to_float(from_float<bf16>(to_float(speech_emb[speech + i]) + to_float(pos_emb[position + i])));
    };
    const int at = 128 * self.warp + 4 * self.lane;
    float x[4], square[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = value(at + i);
      square[i / 2] += x[i] * x[i];
      x[i] *= to_float(gain[at + i]);
    }
    v[r].x = pack2<bf16>(x[0], x[1]);
    v[r].y = pack2<bf16>(x[2], x[3]);
    v[r].z = __float_as_uint(square[0] + square[1]);
    if (self.warp == 0 && self.lane / 8 == r) self.residuals[self.lane] = value(8 * self.cta + self.lane % 8);
  }
  stage_inputs(self, v);
}

/// The word of a head's 32 that holds outputs `output` (even, of a part's 8) and the next one.
__device__ __forceinline__ int head_word(int part, int output) { return 2 * part + (output & 4) * 4 + (output & 2) / 2; }

/// Rotates and sends q, k and v. `words` are what this lane has sent of the rows that its warp finishes.
template <int kHeads, int kRows>
__device__ __forceinline__ void send_heads(const Worker<kHeads, kRows>& self,
                                           uint32_t (&words)[Worker<kHeads, kRows>::kWarpRows]) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
#pragma unroll
  for (int i = 0; i < Worker<kHeads, kRows>::kWarpRows; ++i) {
    const int row = self.warp + i * S::warps;
    words[i] = 0;
    if (row >= self.rows) continue;
    const int kind = lane / 8, output = lane % 8;  // q, k, v; pairs are (output, output + 4)
    float y = sum_over_warps<S, S::row_a>(self.sums_a + row * S::row_a + (lane < 24 ? lane : S::row_a - 1));
    y *= rsqrtf(__shfl_sync(0xffffffffu, y, 24) * (1.0f / S::hidden) + self.p.eps);
    const float other = __shfl_xor_sync(0xffffffffu, y, 4);
    if (kind < 2)
      y = y * self.rotary[row * 8 + lane % 4] + (output < 4 ? -other : other) * self.rotary[row * 8 + 4 + lane % 4];
    words[i] = pack2<bf16>(y, __shfl_xor_sync(0xffffffffu, y, 1));
    if (kind < 3 && output % 2 == 0) {
      store_packet(self.template mailbox<uint2>(M::heads_qkv) + ((self.head * M::kMaxRows + row) * 3 + kind) * 32 +
                       head_word(self.part, output),
                   words[i], self.tag);
    }
  }
}

/// Appends k and v to the cache, from what send_heads has left. After the attention: nobody in this step reads them there.
template <int kHeads, int kRows>
__device__ __forceinline__ void append(const Worker<kHeads, kRows>& self, int layer,
                                       const CacheRow (&cached)[Worker<kHeads, kRows>::kWarpRows],
                                       const uint32_t (&words)[Worker<kHeads, kRows>::kWarpRows]) {
  const int lane = self.lane, kind = lane / 8, output = lane % 8;
#pragma unroll
  for (int i = 0; i < Worker<kHeads, kRows>::kWarpRows; ++i) {
    const CacheRow& cache = cached[i];
    if (cache.row < 0 || kind < 1 || kind > 2 || output % 2 != 0) continue;  // no row of this warp's has no cache row either
    const int64_t* stride = kind == 1 ? self.p.k_stride : self.p.v_stride;
    bf16* to = static_cast<bf16*>(kind == 1 ? self.p.k_cache : self.p.v_cache) + layer * stride[0] + cache.row * stride[1] +
               cache.length * stride[2] + self.head * stride[3] + 2 * head_word(self.part, output);
    *reinterpret_cast<uint32_t*>(to) = words[i];
  }
}

/// Adds the sums (warps, rows, 8) to the residual, and sends it on, times the gain of the norm that follows.
template <int kStride, int kHeads, int kRows>
__device__ __forceinline__ void send_residual(const Worker<kHeads, kRows>& self, const float* sums, size_t offset,
                                              uint32_t gain) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
  if (self.warp > 0) return;
  const int row = lane / 4, pair = lane % 4;  // outputs 2 * pair and 2 * pair + 1
  float2 y = make_float2(0.0f, 0.0f);
  if (row < self.rows) {
    float2* residual = reinterpret_cast<float2*>(self.residuals + 2 * lane);
    const float2 sum = pair_over_warps<S, kStride>(sums + row * kStride + 2 * pair);
    y = *residual;
    y.x += sum.x;
    y.y += sum.y;
    *residual = y;
  }
  float square = y.x * y.x + y.y * y.y;
  const float2 g = unpack2<bf16>(gain);
  const uint32_t word = pack2<bf16>(y.x * g.x, y.y * g.y);
  const uint32_t next = __shfl_xor_sync(0xffffffffu, word, 1);  // inputs 2 and 3 of 4
  square += __shfl_xor_sync(0xffffffffu, square, 1);
  if (row < self.rows && pair % 2 == 0) {
    uint4* to = self.template mailbox<uint4>(offset) + (row * S::ctas + self.cta) * M::x_packets + pair / 2;
    store_packet(to, word, next, __float_as_uint(square), self.tag);
  }
}

/// 1 / rms of the row whose sums (warps, 64 and the sum of squares) these are.
template <int kHeads, int kRows>
__device__ __forceinline__ float inverse_rms(const Worker<kHeads, kRows>& self, const float* sums) {
  using S = PersistentShape<kHeads, kRows>;
  return rsqrtf(sum_over_warps<S, S::row_b>(sums + S::row_b - 1) * (1.0f / S::hidden) + self.p.eps);
}

/// silu(gate) * up of this CTA's 32 intermediate values, in the order of staging.
template <int kHeads, int kRows>
__device__ __forceinline__ void send_gated(const Worker<kHeads, kRows>& self) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
#pragma unroll 1
  for (int row = self.warp; row < self.rows; row += S::warps) {
    const float* sums = self.sums_b + row * S::row_b;
    const float scale = inverse_rms(self, sums);
    const float gate = sum_over_warps<S, S::row_b>(sums + lane) * scale;
    const float up = sum_over_warps<S, S::row_b>(sums + 32 + lane) * scale;
    const float y = silu(gate) * up;
    const uint32_t word = pack2<bf16>(y, __shfl_xor_sync(0xffffffffu, y, 1));
    uint32_t words[3];
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      const int at = min(3 * lane + m, 15);  // place in staging: word at / 4 + at % 4 * 4
      words[m] = __shfl_sync(0xffffffffu, word, 2 * (at / 4 + at % 4 * 4));
    }
    if (lane < M::gated_packets) {
      store_packet(self.template mailbox<uint4>(M::gated) + (row * S::ctas + self.cta) * M::gated_packets + lane, words[0],
                   words[1], words[2], self.tag);
    }
  }
}

/// Inputs 512 * warp ... of down: from 16 CTAs, in `passes`.
template <int kHeads, int kRows>
__device__ __forceinline__ void receive_gated(const Worker<kHeads, kRows>& self, int pass) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
  constexpr int kN = 3 / S::passes + (3 % S::passes != 0), kPackets = 16 / S::passes * M::gated_packets;
  const uint4* from =
      self.template mailbox<const uint4>(M::gated) + (16 * self.warp + 16 / S::passes * pass) * M::gated_packets + lane;
  auto wanted = [&](int j) { return lane + 32 * j < kPackets; };
  int place[kN];  // in staging; known before the packets are there
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const int i = lane + 32 * j;
    place[j] = ptx::opaque(i / M::gated_packets * 16 + i % M::gated_packets * 3);
  }
  uint4 v[kN * kRows];
  receive(
      v, from, self.tag, [](int j) { return j / kN * S::ctas * M::gated_packets + j % kN * 32; },
      [&](int j) { return wanted(j % kN) && j / kN < self.rows; });
#pragma unroll
  for (int j = 0; j < kN * kRows; ++j) {
    uint32_t* to = self.staging + place[j % kN] + j / kN * S::gated_words;
    if (wanted(j % kN)) {
      to[0] = v[j].x;
      if ((lane + 32 * (j % kN)) % M::gated_packets < M::gated_packets - 1) {
        to[1] = v[j].y;
        to[2] = v[j].z;
      }
    }
  }
  __syncwarp();
}

}  // namespace vivace::step
