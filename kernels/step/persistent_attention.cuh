// Attention of the persistent step: a CTA's keys, its part of a row, and the merge of the parts.
#pragma once

#include "kernels/step/persistent_probe.cuh"
#include "kernels/step/persistent_worker.cuh"

namespace vivace::step {

/// One row's attention over this CTA's n keys, of which this warp takes every kWarps-th group of 16, from `share` on.
/// `query` holds word `lane` of the row's query. Leaves (output, max, sum) of this warp in its slot, in powers of two. All
/// rows of the A operand are the query; of the weights, even rows are their rounded values and odd rows the rest.
template <int kHeads, int kRows>
__device__ __forceinline__ void attend_row(Worker<kHeads, kRows>& self, uint32_t query, int n, int share, float* slots,
                                           float* scores, int room) {
  using S = PersistentShape<kHeads, kRows>;
  const int lane = self.lane;
  const float scale = self.p.softmax_scale * 1.44269504f;
  const int pair = 2 * (lane % 4);  // of a tile of 8 keys or dimensions
  float out[8][4] = {}, top = -INFINITY, sum = 0.0f;
  uint32_t q[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = __shfl_sync(0xffffffffu, query, 4 * i + lane % 4);
  const uint32_t row = lane % 8, piece = lane / 8;
  const uint32_t k_lo = row * 128 + (piece ^ row) * 16, k_hi = row * 128 + ((piece + 4) ^ row) * 16;
  const uint32_t v_row = piece % 2 * 1024 + row * 128;
#pragma unroll 1
  for (int chunk = 0; chunk * S::chunk < n; ++chunk) {
    self.ring.template wait_full<1>();
    uint32_t bits = 0;
    const int group = share - chunk % 2 * S::chunk_groups, first = chunk * S::chunk + 16 * group;
    if (group >= 0 && group < S::chunk_groups && first < n) {
      const uint32_t keys = ptx::shared_address(self.ring.stage(0)) + group * 2048, values = keys + S::stage_bytes / 2;
      float s[2][4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t lo[4], hi[4];
        ptx::ldmatrix_x4(lo, keys + j * 1024 + k_lo);
        ptx::ldmatrix_x4(hi, keys + j * 1024 + k_hi);
        bits |= lo[0] | hi[0];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t a[4] = {q[2 * i], q[2 * i], q[2 * i + 1], q[2 * i + 1]};
          ptx::mma_m16n8k16<bf16>(s[j], a, i < 2 ? lo[2 * i] : hi[2 * i - 4], i < 2 ? lo[2 * i + 1] : hi[2 * i - 3]);
        }
      }
      float new_top = top;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + i / 2 * 8 + pair + i % 2;
        float& x = s[i / 2][i % 2];
        x = key < n ? x * scale : -INFINITY;
        if (scores != nullptr && lane < 4 && key < n && key < room) scores[key] = x;
        new_top = fmaxf(new_top, x);
      }
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
      const float keep = ptx::exp2_approx(top - new_top);
      top = new_top;
      sum *= keep;
      uint32_t a[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x = ptx::exp2_approx(s[j][0] - top), y = ptx::exp2_approx(s[j][1] - top);
        sum += x + y;
        const uint32_t rounded = pack2<bf16>(x, y);
        const float2 r = unpack2<bf16>(rounded);
        a[2 * j] = lane / 4 % 2 == 0 ? rounded : pack2<bf16>(x - r.x, y - r.y);
      }
      // What lies behind the last key may be no number.
      const int left = n - first - pair;
      const uint32_t mask[2] = {left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u, left >= 10 ? ~0u : left == 9 ? 0xffffu : 0u};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, values + v_row + ((2 * i + piece / 2) ^ row) * 16);
        bits |= v[0];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float(&d)[4] = out[2 * i + u];
          d[0] *= keep;
          d[1] *= keep;
          ptx::mma_m16n8k16<bf16>(d, a, v[2 * u] & mask[0], v[2 * u + 1] & mask[1]);
        }
      }
    }
    self.ring.template release<1>(lane, bits & self.zero);
  }
  if (16 * share >= n) return;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  float* slot = slots + share * S::slot_floats;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = out[i][0] + __shfl_xor_sync(0xffffffffu, out[i][0], 4);
    const float y = out[i][1] + __shfl_xor_sync(0xffffffffu, out[i][1], 4);
    if (lane < 4) *reinterpret_cast<float2*>(slot + 8 * i + pair) = make_float2(x, y);
  }
  if (lane == 0) *reinterpret_cast<float2*>(slot + S::head_dim) = make_float2(top, sum);
}

/// This CTA's share of the head's attention, row by row. The last part of a row also has the new key, from the packets, in
/// a slot of its own.
template <int kHeads, int kRows>
__device__ __forceinline__ void attend(Worker<kHeads, kRows>& self, int layer) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
#pragma unroll 1
  for (int row = 0; row < self.rows; ++row) {
    const KeyRange range = key_range<S>(layer, row, self.part, self.length_of(row));
    if (range.part < 0) continue;
    const int share = (self.warp + 4 * row + row / 2 * 2) % S::warps;  // rows with few keys are spread over the warps
    const bool has_new_key = range.last && share == S::warps - 1, has_old_keys = 16 * share < range.end - range.first;
    uint2 word[3] = {};  // lane's words of q, k, v
    float* slots = self.sums_b + row * S::slots * S::slot_floats;
    float* scores = nullptr;  // of this CTA's keys, where they are probed
    int room = 0;
    if (self.probes != nullptr) {
      const int probe = find_probe(self.p, layer, self.head);
      if (probe >= 0) scores = probe_row(self.p, probe, row) + range.first;
      room = static_cast<int>(self.p.probe_capacity) - range.first;
    }
    if (has_new_key || has_old_keys) {
      receive(
          word, self.template mailbox<const uint2>(M::heads_qkv) + (self.head * M::kMaxRows + row) * 96 + self.lane,
          self.tag, [](int j) { return j * 32; }, [&](int j) { return j == 0 || has_new_key; });
      if (has_new_key) {
        const float2 q = unpack2<bf16>(word[0].x), k = unpack2<bf16>(word[1].x);
        float score = (q.x * k.x + q.y * k.y) * (self.p.softmax_scale * 1.44269504f);
#pragma unroll
        for (int m = 1; m < 32; m *= 2) score += __shfl_xor_sync(0xffffffffu, score, m);
        float* slot = slots + S::warps * S::slot_floats;
        *reinterpret_cast<float2*>(slot + 2 * self.lane) = unpack2<bf16>(word[2].x);
        if (self.lane == 0) *reinterpret_cast<float2*>(slot + S::head_dim) = make_float2(score, 1.0f);
        if (scores != nullptr && self.lane == 0 && range.end - range.first < room) scores[range.end - range.first] = score;
      }
    }
    if (range.end > range.first) attend_row(self, word[0].x, range.end - range.first, share, slots, scores, room);
  }
}

/// Merges the warps' slots and sends this CTA's part of the row's attention.
template <int kHeads, int kRows>
__device__ __forceinline__ void send_part(const Worker<kHeads, kRows>& self, int layer) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
#pragma unroll 1
  for (int row = self.warp; row < self.rows; row += S::warps) {
    const int length = self.length_of(row);
    const KeyRange range = key_range<S>(layer, row, self.part, length);
    if (range.part < 0) continue;
    const int used = min(S::warps, (range.end - range.first + 15) / 16);
    const float* slots = self.sums_b + row * S::slots * S::slot_floats;
    float2 state[S::slots], out[S::slots];
    float top = -INFINITY;
#pragma unroll
    for (int s = 0; s < S::slots; ++s) {
      const bool is_used = s < S::warps ? s < used : range.last;
      state[s] = is_used ? *reinterpret_cast<const float2*>(slots + s * S::slot_floats + S::head_dim)
                         : make_float2(-INFINITY, 0.0f);
      out[s] = is_used ? *reinterpret_cast<const float2*>(slots + s * S::slot_floats + 2 * lane) : make_float2(0.0f, 0.0f);
      top = fmaxf(top, state[s].x);
    }
    float sum = 0.0f, x = 0.0f, y = 0.0f;
    const float from = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int s = 0; s < S::slots; ++s) {
      const float share = ptx::exp2_approx(state[s].x - from);
      sum += share * state[s].y;
      x += share * out[s].x;
      y += share * out[s].y;
    }
    const float scale = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    const uint32_t lse = __float_as_uint(sum == 0.0f ? -INFINITY : top + __log2f(sum));
    const uint32_t word = pack2<bf16>(x * scale, y * scale);
    const int at = self.head * S::group + range.part;
    uint32_t words[3];
#pragma unroll
    for (int m = 0; m < 3; ++m) words[m] = __shfl_sync(0xffffffffu, word, min(3 * lane + m, 31));
    if (lane < M::part_packets) {
      uint4* to = self.template mailbox<uint4>(M::parts) + (row * S::ctas + at) * M::part_packets + lane;
      store_packet(to, words[0], words[1], lane == M::part_packets - 1 ? lse : words[2], self.tag);
    }
  }
}

/// Packets of parts `first` ... of the row's heads 2 * warp and 2 * warp + 1, for lanes 0 ... 10 and 16 ... 26.
template <int kHeads, int kRows>
__device__ __forceinline__ const uint4* part_packets(const Worker<kHeads, kRows>& self, int row, int first) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
  const int at = row * S::ctas + (2 * self.warp + lane / 16) * S::group + first;
  return self.template mailbox<const uint4>(M::parts) + at * M::part_packets + lane % 16;
}

/// Merges the parts of two heads' attention to inputs of the output projection, in this warp's staging: 11 lanes a head,
/// 6 outputs a lane.
template <int kHeads, int kRows>
__device__ __forceinline__ void receive_parts(Worker<kHeads, kRows>& self, int layer) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  const int lane = self.lane;
  constexpr int kPackets = M::part_packets, kBatch = S::batch;
  const bool reads = lane % 16 < kPackets;
  uint4 packets[kRows * kBatch];
  receive(
      packets, part_packets(self, 0, 0), self.tag, [](int j) { return (j / kBatch * S::ctas + j % kBatch) * kPackets; },
      [&](int j) { return j / kBatch < self.rows && reads; });
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float top = -INFINITY, sum = 0.0f, out[6] = {};
    auto merge = [&](const uint4* v) {
      float share[kBatch], new_top = top;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        share[j] = __uint_as_float(__shfl_sync(0xffffffffu, v[j].z, lane / 16 * 16 + kPackets - 1));
        new_top = fmaxf(new_top, share[j]);
      }
      const float from = new_top == -INFINITY ? 0.0f : new_top, keep = ptx::exp2_approx(top - from);
      top = new_top;
      sum *= keep;
#pragma unroll
      for (int m = 0; m < 6; ++m) out[m] *= keep;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        share[j] = ptx::exp2_approx(share[j] - from);
        sum += share[j];
        const float2 a = unpack2<bf16>(v[j].x), b = unpack2<bf16>(v[j].y), c = unpack2<bf16>(v[j].z);
        out[0] += share[j] * a.x;
        out[1] += share[j] * a.y;
        out[2] += share[j] * b.x;
        out[3] += share[j] * b.y;
        out[4] += share[j] * c.x;
        out[5] += share[j] * c.y;
      }
    };
    merge(packets + row * kBatch);
    const int parts = 1 << parts_log2<S>(self.lengths[row]);
#pragma unroll 1
    for (int first = kBatch; first < parts; first += kBatch) {
      uint4 v[kBatch];
      receive(
          v, part_packets(self, row, first), self.tag, [](int j) { return j * kPackets; }, [&](int) { return reads; });
      merge(v);
    }
    if (self.probes != nullptr && self.warp == self.head / 2 && lane == self.head % 2 * 16) {
      const int probe = find_probe(self.p, layer, self.head);
      if (probe >= 0) self.probe_lse[probe * kRows + row] = top + __log2f(sum);
    }
    const float scale = __fdividef(1.0f, sum);
    if (reads) {
      uint32_t* to = self.staging + row * 64 + lane / 16 * 32;
      const int k = lane % 16;
      to[staged(3 * k)] = pack2<bf16>(out[0] * scale, out[1] * scale);
      to[staged(3 * k + 1)] = pack2<bf16>(out[2] * scale, out[3] * scale);
      if (k < kPackets - 1) to[staged(3 * k + 2)] = pack2<bf16>(out[4] * scale, out[5] * scale);
    }
  }
  __syncwarp();
}

}  // namespace vivace::step
