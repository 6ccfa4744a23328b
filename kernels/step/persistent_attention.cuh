// Attention of the persistent step: a CTA's keys, its part of a row, and the merge of the parts.
#pragma once

#include "kernels/step/persistent_probe.cuh"
#include "kernels/step/persistent_worker.cuh"

namespace vivace::step {

/// Keys that a warp has in registers: kGroups groups of 16, of a round of so many for every warp, as B operands of 8 keys x
/// 64 dimensions each.
struct HeldKeys {
  static constexpr int kGroups = 2;
  uint32_t k[kGroups][2][8];
};
/// The stages of a round, of which `left` keys remain; and in them a warp's g-th group of keys, its values half a stage on.
template <typename S>
__device__ __forceinline__ int round_stages(int left) {
  return min(HeldKeys::kGroups * S::warps / S::chunk_groups, (left + S::chunk - 1) / S::chunk);
}
template <typename S>
__device__ __forceinline__ uint32_t group_address(const Ring<S>& ring, int group) {
  return ptx::shared_address(ring.stage(group / S::chunk_groups)) + group % S::chunk_groups * 2048;
}

/// The g-th group of 16 keys of a warp, or where there is none, one that is: so that registers are loaded in any case, and
/// the compiler does not take what they held before for a value to be kept.
template <typename S>
__device__ __forceinline__ int held_group(int share, int g, int left) {
  return max(min(share + g * S::warps, (left - 1) / 16), 0);
}

/// Keys of a round; `left` of the row's part remain, of which a round takes the first. Waits for their stages.
template <int kHeads, int kRows>
__device__ __forceinline__ uint32_t hold_keys(const Worker<kHeads, kRows>& self, int lane, int left, int share,
                                              HeldKeys& held) {
  using S = PersistentShape<kHeads, kRows>;
  self.ring.template wait_full_some<HeldKeys::kGroups * S::warps / S::chunk_groups>(round_stages<S>(left));
  const uint32_t row = lane % 8, piece = lane / 8;
  const uint32_t k_lo = row * 128 + (piece ^ row) * 16, k_hi = row * 128 + ((piece + 4) ^ row) * 16;
  uint32_t bits = 0;
#pragma unroll
  for (int g = 0; g < HeldKeys::kGroups; ++g) {
    const uint32_t keys = group_address(self.ring, held_group<S>(share, g, left));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, keys + j * 1024 + k_lo);
#pragma unroll
      for (int i = 0; i < 4; ++i) held.k[g][j][i] = r[i];
      bits |= r[0];
      ptx::ldmatrix_x4(r, keys + j * 1024 + k_hi);
#pragma unroll
      for (int i = 0; i < 4; ++i) held.k[g][j][4 + i] = r[i];
      bits |= r[0];
    }
  }
  return bits;
}

/// A warp's share of a row's attention, in powers of two: d[0] and d[1] of a tile of 8 dimensions (all lanes / 4 the same),
/// d[2] and d[3] what the rounded weights lack.
struct Attended {
  float out[8][4] = {};
  float top = -INFINITY, sum = 0.0f;
};

/// Attention over held keys, `first` being the number of the round's first one and `left` how many there are from there on.
/// The query is in all rows of A; of the weights, the upper half of A has their rounded values, the lower half the rest.
template <int kHeads, int kRows>
__device__ __forceinline__ uint32_t attend_held(const Worker<kHeads, kRows>& self, int lane, const HeldKeys& held,
                                                uint32_t query, int first, int left, int share, Attended& state,
                                                float* scores, int room) {
  using S = PersistentShape<kHeads, kRows>;
  const float scale = self.p.softmax_scale * 1.44269504f;
  const int pair = 2 * (lane % 4);  // of a tile of 8 keys or dimensions
  uint32_t q[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = __shfl_sync(0xffffffffu, query, 4 * i + lane % 4);
  float s[HeldKeys::kGroups][4];
  float new_top = state.top;
#pragma unroll
  for (int g = 0; g < HeldKeys::kGroups; ++g) {
    const int at = 16 * (share + g * S::warps);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[g][i] = -INFINITY;
    if (at >= left) continue;
    float d[2][2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t a[4] = {q[2 * i], q[2 * i], q[2 * i + 1], q[2 * i + 1]};
        ptx::mma_m16n8k16<bf16>(d[j][i % 2], a, held.k[g][j][2 * i], held.k[g][j][2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = at + i / 2 * 8 + pair + i % 2;
      const float x = (d[i / 2][0][i % 2] + d[i / 2][1][i % 2]) * scale;
      s[g][i] = key < left ? x : -INFINITY;
      if (scores != nullptr && lane < 4 && key < left && first + key < room) scores[first + key] = x;
      new_top = fmaxf(new_top, s[g][i]);
    }
  }
  uint32_t v[HeldKeys::kGroups][4][4], bits = 0;  // 16 keys x 16 dimensions each
  const uint32_t line = lane % 8, piece = lane / 8;
#pragma unroll
  for (int g = 0; g < HeldKeys::kGroups; ++g) {
    const uint32_t values =
        group_address(self.ring, held_group<S>(share, g, left)) + S::stage_bytes / 2 + piece % 2 * 1024 + line * 128;
    // What lies behind the last key may be no number.
    const int valid = left - 16 * (share + g * S::warps) - pair;
    const uint32_t mask[2] = {valid >= 2 ? ~0u : valid == 1 ? 0xffffu : 0u, valid >= 10 ? ~0u : valid == 9 ? 0xffffu : 0u};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::ldmatrix_x4_trans(v[g][i], values + ((2 * i + piece / 2) ^ line) * 16);
      bits |= v[g][i][0];
#pragma unroll
      for (int u = 0; u < 4; ++u) v[g][i][u] &= mask[u % 2];
    }
  }
  new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
  new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
  if (first > 0) {
    const float keep = ptx::exp2_approx(state.top - new_top);
    state.sum *= keep;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.out[i][e] *= keep;
    }
  }
  state.top = new_top;
#pragma unroll
  for (int g = 0; g < HeldKeys::kGroups; ++g) {
    if (16 * (share + g * S::warps) >= left) continue;
    uint32_t a[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float x = ptx::exp2_approx(s[g][2 * j] - new_top), y = ptx::exp2_approx(s[g][2 * j + 1] - new_top);
      state.sum += x + y;
      a[2 * j] = pack2<bf16>(x, y);
      const float2 rounded = unpack2<bf16>(a[2 * j]);
      a[2 * j + 1] = pack2<bf16>(x - rounded.x, y - rounded.y);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      ptx::mma_m16n8k16<bf16>(state.out[i], a, v[g][i / 2][2 * (i % 2)], v[g][i / 2][2 * (i % 2) + 1]);
    }
  }
  return bits;
}

/// This CTA's share of the head's attention, row by row; leaves (output, max, sum) of every warp in its slot. A warp takes
/// every S::warps-th group of 16 keys from `share` on, and has them in registers before the query arrives. The last part of
/// a row also has the new key, from the packets, in a slot of its own.
template <int kHeads, int kRows>
__device__ __forceinline__ void attend(Worker<kHeads, kRows>& self, int layer) {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  constexpr int kRound = 16 * HeldKeys::kGroups * S::warps;
  const int lane = ptx::opaque(self.lane);
#pragma unroll 1
  for (int row = 0; row < self.rows; ++row) {
    const KeyRange range = key_range<S>(layer, row, self.part, self.length_of(row));
    if (range.part < 0) continue;
    const int n = range.end - range.first;
    const int share = static_cast<int>(static_cast<uint32_t>(self.warp + 4 * row + row / 2 * 2) %
                                       S::warps);  // rows with few keys are spread over the warps
    const bool has_new_key = range.last && share == S::warps - 1, has_old_keys = 16 * share < n;
    uint2 word[3] = {};  // lane's words of q, k, v
    float* slots = self.sums_b + row * S::slots * S::slot_floats;
    float* scores = nullptr;  // of this CTA's keys, where they are probed
    int room = 0;
    if (self.probes != nullptr) {
      const int probe = find_probe(self.p, layer, self.head);
      if (probe >= 0) scores = probe_row(self.p, probe, row) + range.first;
      room = static_cast<int>(self.p.probe_capacity) - range.first;
    }
    Attended state;
#pragma unroll 1
    for (int first = 0; first == 0 || first < n; first += kRound) {
      HeldKeys held;
      uint32_t bits = hold_keys(self, lane, n - first, share, held);
      if (first == 0 && (has_new_key || has_old_keys)) {
        receive(
            word, self.template mailbox<const uint2>(M::heads_qkv) + (self.head * M::kMaxRows + row) * 96 + lane, self.tag,
            [](int j) { return j * 32; }, [&](int j) { return j == 0 || has_new_key; });
      }
      if (first + 16 * share < n) {
        bits |= attend_held(self, lane, held, word[0].x, first, n - first, share, state, scores, room);
      }
      if (first < n) self.ring.release_some(lane, round_stages<S>(n - first), bits & self.zero);
    }
    if (has_old_keys) {
      state.sum += __shfl_xor_sync(0xffffffffu, state.sum, 1);
      state.sum += __shfl_xor_sync(0xffffffffu, state.sum, 2);
      float* slot = slots + share * S::slot_floats;
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float(&d)[4] = state.out[i];
          *reinterpret_cast<float2*>(slot + 8 * i + 2 * lane) = make_float2(d[0] + d[2], d[1] + d[3]);
        }
      }
      if (lane == 0) *reinterpret_cast<float2*>(slot + S::head_dim) = make_float2(state.top, state.sum);
    }
    if (has_new_key) {
      const float2 q = unpack2<bf16>(word[0].x), k = unpack2<bf16>(word[1].x);
      float score = (q.x * k.x + q.y * k.y) * (self.p.softmax_scale * 1.44269504f);
#pragma unroll
      for (int m = 1; m < 32; m *= 2) score += __shfl_xor_sync(0xffffffffu, score, m);
      float* slot = slots + S::warps * S::slot_floats;
      *reinterpret_cast<float2*>(slot + 2 * lane) = unpack2<bf16>(word[2].x);
      if (lane == 0) *reinterpret_cast<float2*>(slot + S::head_dim) = make_float2(score, 1.0f);
      if (scores != nullptr && lane == 0 && n < room) scores[n] = score;
    }
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
  // Two neighbouring parts as one; returns their log-sum-exp.
  auto merge = [&](const uint4* v, float(&out)[6]) {
    const int last = lane / 16 * 16 + kPackets - 1;
    const float2 lse = make_float2(__uint_as_float(__shfl_sync(0xffffffffu, v[0].z, last)),
                                   __uint_as_float(__shfl_sync(0xffffffffu, v[1].z, last)));
    const float share[2] = {__fdividef(1.0f, 1.0f + ptx::exp2_approx(lse.y - lse.x)),
                            __fdividef(1.0f, 1.0f + ptx::exp2_approx(lse.x - lse.y))};
    const uint32_t words[2][3] = {{v[0].x, v[0].y, v[0].z}, {v[1].x, v[1].y, v[1].z}};
#pragma unroll
    for (int m = 0; m < 3; ++m) {
      const float2 x = unpack2<bf16>(words[0][m]), y = unpack2<bf16>(words[1][m]);
      out[2 * m] = share[0] * x.x + share[1] * y.x;
      out[2 * m + 1] = share[0] * x.y + share[1] * y.y;
    }
    return lse;
  };
  auto sum = [](float2 lse) {
    const float top = fmaxf(lse.x, lse.y);
    return top + __log2f(ptx::exp2_approx(lse.x - top) + ptx::exp2_approx(lse.y - top));
  };
  float2 pair[kRows];  // log-sum-exp of the first two parts
  float lse[kRows], out[kRows][6];
  int parts[kRows], most = kBatch;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    pair[row] = merge(packets + row * kBatch, out[row]);
    parts[row] = 1 << parts_log2<S>(self.lengths[row]);
    most = max(most, parts[row]);
  }
  if (most > kBatch || self.probes != nullptr) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) lse[row] = sum(pair[row]);
  }
#pragma unroll 1
  for (int first = kBatch; first < most; first += kBatch) {
    uint4 v[kRows * kBatch];
    receive(
        v, part_packets(self, 0, first), self.tag, [](int j) { return (j / kBatch * S::ctas + j % kBatch) * kPackets; },
        [&](int j) { return reads && first < parts[j / kBatch]; });
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (first >= parts[row]) continue;
      float more[6];
      const float other = sum(merge(v + row * kBatch, more)), top = fmaxf(lse[row], other);
      const float a = ptx::exp2_approx(lse[row] - top), b = ptx::exp2_approx(other - top), scale = __fdividef(1.0f, a + b);
#pragma unroll
      for (int m = 0; m < 6; ++m) out[row][m] = (a * out[row][m] + b * more[m]) * scale;
      lse[row] = top + __log2f(a + b);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (self.probes != nullptr && self.warp == self.head / 2 && lane == self.head % 2 * 16) {
      const int probe = find_probe(self.p, layer, self.head);
      if (probe >= 0) self.probe_lse[probe * kRows + row] = lse[row];
    }
    if (reads) {
      uint32_t* to = self.staging + row * 64 + lane / 16 * 32;
      const int k = lane % 16;
      to[staged(3 * k)] = pack2<bf16>(out[row][0], out[row][1]);
      to[staged(3 * k + 1)] = pack2<bf16>(out[row][2], out[row][3]);
      if (k < kPackets - 1) to[staged(3 * k + 2)] = pack2<bf16>(out[row][4], out[row][5]);
    }
  }
  __syncwarp();
}

}  // namespace vivace::step
