// The consumers of the persistent step: a layer's phases, and what goes between CTAs.
#pragma once

#include "kernels/step/persistent_produce.cuh"

namespace vivace::step {

/// One consumer warp.
template <int kHeads, int kRows>
struct Consumer {
  using S = PersistentShape<kHeads, kRows>;
  using M = Mailboxes<kHeads>;
  static constexpr int kThreads = 32 * S::warps;
  static constexpr int kWarpRows = (kRows + S::warps - 1) / S::warps;  // rows that a warp finishes, where a warp takes a row
  static constexpr int kDownBlocks = S::heads < 8 ? S::heads : 8;      // of a stage, that a warp multiplies

  const StepParams& p;
  uint32_t zero;
  Ring<S> ring;
  uint32_t* staging;   // this warp's, (rows, 64) words; (rows, gated_words) for down
  uint32_t* attended;  // the CTA's, (rows, 32) words: merged attention of its head
  float *sums_a, *sums_b, *sums_c;
  const int warp, lane = static_cast<int>(threadIdx.x) % 32;
  const int cta = static_cast<int>(blockIdx.x), head = cta / S::group, part = cta % S::group;
  const int rows = static_cast<int>(p.rows);
  uint32_t tag = 0;
  float residual = 0.0f;  // of row (32 * warp + lane) / 8, output 8 * cta + lane % 8
  int keys[kRows];        // old keys of each row that this CTA reads

  template <typename Packet>
  __device__ __forceinline__ Packet* mailbox(size_t offset) const {
    return reinterpret_cast<Packet*>(static_cast<uint8_t*>(p.workspace) + offset);
  }
  __device__ __forceinline__ void synchronize() const {
    __syncwarp();
    sm90::named_barrier_sync(1, kThreads);
  }

  /// Packets of inputs, lane l with inputs 4 * l ... 4 * l + 3 of this warp's 128, to staging; the rows' sums of squares to
  /// the end of the rows of `sums`.
  template <int kStride>
  __device__ __forceinline__ void stage_inputs(const uint4 (&v)[kRows], float* sums) {
    const int at = staged(2 * lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      staging[r * 64 + at] = v[r].x;
      staging[r * 64 + at + 4] = v[r].y;
      float square = __uint_as_float(v[r].z);  // 0 in odd lanes
#pragma unroll
      for (int m = 2; m < 32; m *= 2) square += __shfl_xor_sync(0xffffffffu, square, m);
      if (lane == 0) sums[(warp * kRows + r) * kStride + kStride - 1] = square;
    }
    __syncwarp();
  }
  template <int kStride>
  __device__ __forceinline__ void receive_inputs(size_t offset, float* sums) {
    uint4 v[kRows];
    receive(
        v, mailbox<const uint4>(offset) + warp * 32 + lane, tag, [](int r) { return r * S::ctas * M::x_packets; },
        [&](int r) { return r < rows; });
    stage_inputs<kStride>(v, sums);
  }

  /// The first layer's inputs, without an exchange: embeddings, as packets would bring them. Sets this CTA's residuals.
  __device__ __forceinline__ void embed() {
    const bf16* speech_emb = static_cast<const bf16*>(p.speech_emb);
    const bf16* pos_emb = static_cast<const bf16*>(p.speech_pos_emb);
    const bf16* gain = static_cast<const bf16*>(p.input_norm);
    uint4 v[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      v[r] = uint4{};
      if (r >= rows) continue;
      const int64_t q = clamp_index(p.row_request[r], p.requests);
      const int64_t speech = clamp_index(p.tokens[q], p.speech_tokens) * S::hidden;
      const int64_t position = clamp_index(p.positions[q], p.speech_positions) * S::hidden;
      auto value = [&](int i) {
        return to_float(from_float<bf16>(to_float(speech_emb[speech + i]) + to_float(pos_emb[position + i])));
      };
      const int at = 128 * warp + 8 * (lane / 2);
      float x[8], square = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[i] = value(at + i);
        square += x[i] * x[i];
        x[i] *= to_float(gain[at + i]);
      }
      const bool second = lane % 2 != 0;
      v[r].x = second ? pack2<bf16>(x[4], x[5]) : pack2<bf16>(x[0], x[1]);
      v[r].y = second ? pack2<bf16>(x[6], x[7]) : pack2<bf16>(x[2], x[3]);
      v[r].z = second ? 0u : __float_as_uint(square);
      if ((32 * warp + lane) / 8 == r) residual = value(8 * cta + lane % 8);
    }
    stage_inputs<S::row_a>(v, sums_a);
  }

  /// Adds the sums (warps, rows, 8) to the residual, and sends it on, times the gain of the norm that follows.
  template <int kStride>
  __device__ __forceinline__ void send_residual(const float* sums, size_t offset, float gain) {
    if (4 * warp >= kRows) return;
    const int row = (32 * warp + lane) / 8, output = lane % 8;
    if (row < rows) residual += sum_over_warps<S, kStride>(sums + row * kStride + output);
    const float y = residual * gain;
    const uint32_t word = pack2<bf16>(y, __shfl_xor_sync(0xffffffffu, y, 1));
    const uint32_t next = __shfl_xor_sync(0xffffffffu, word, 2);  // inputs 2 and 3 of 4
    float square = residual * residual;
#pragma unroll
    for (int m = 1; m < 8; m *= 2) square += __shfl_xor_sync(0xffffffffu, square, m);
    if (row < rows && output % 4 == 0) {
      uint4* to = mailbox<uint4>(offset) + (row * S::ctas + cta) * M::x_packets + output / 4;
      store_packet(to, word, next, output == 0 ? __float_as_uint(square) : 0, tag);
    }
  }

  /// Rotates and sends q, k and v, and appends k and v to the cache.
  __device__ __forceinline__ void send_heads(int layer, const CacheRow (&cached)[kWarpRows],
                                             const float (&cosine)[kWarpRows], const float (&sine)[kWarpRows]) {
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int row = warp + i * S::warps;
      if (row >= rows) break;
      const int kind = lane / 8, output = lane % 8;  // q, k, v; pairs are (output, output + 4)
      float y = sum_over_warps<S, S::row_a>(sums_a + row * S::row_a + min(lane, 24));
      y *= rsqrtf(__shfl_sync(0xffffffffu, y, 24) * (1.0f / S::hidden) + p.eps);
      const float other = __shfl_xor_sync(0xffffffffu, y, 4);
      if (kind < 2) y = y * cosine[i] + (output < 4 ? -other : other) * sine[i];
      const uint32_t word = pack2<bf16>(y, __shfl_xor_sync(0xffffffffu, y, 1));
      if (kind < 3 && output % 2 == 0) {
        const int at = 2 * part + (output & 4) * 4 + (output & 2) / 2;  // of the 32 words of a head
        store_packet(mailbox<uint2>(M::heads_qkv) + ((head * M::kMaxRows + row) * 3 + kind) * 32 + at, word, tag);
        const CacheRow& cache = cached[i];
        if (kind > 0 && cache.writes) {
          const int64_t* stride = kind == 1 ? p.k_stride : p.v_stride;
          bf16* to = static_cast<bf16*>(kind == 1 ? p.k_cache : p.v_cache) + layer * stride[0] + cache.row * stride[1] +
                     cache.length * stride[2] + head * stride[3] + 2 * at;
          *reinterpret_cast<uint32_t*>(to) = word;
        }
      }
    }
  }

  /// One row's attention over this CTA's keys: a key takes 8 lanes, a warp 8 keys of every `chunk`. `q` holds word `lane` of
  /// the row's query. Leaves (output, max, sum) of this warp in its slot, in powers of two.
  __device__ __forceinline__ void attend_row(uint32_t query, int n, int share, float* slots) {
    const float scale = p.softmax_scale * 1.44269504f;
    const int eighth = lane % 8, quarter = lane / 8;
    float* slot = slots + share * S::slot_floats;
    float q[8], out[8] = {}, top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<bf16>(__shfl_sync(0xffffffffu, query, 4 * eighth + i));
      q[2 * i] = pair.x * scale;
      q[2 * i + 1] = pair.y * scale;
    }
    for (int first = 0; first < n; first += S::chunk) {
      ring.template wait_full<1>();
      uint32_t bits = 0;
      if (first + 8 * share < n) {
        const uint8_t* at = ring.stage(0) + (8 * share + quarter) * 128 + eighth * 16;
        float score[2];
        uint32_t v[2][4];
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const bool valid = first + 8 * share + quarter + 4 * u < n;
          const uint4 ks = *reinterpret_cast<const uint4*>(at + 512 * u);
          const uint4 vs = *reinterpret_cast<const uint4*>(at + 512 * u + S::stage_bytes / 2);
          bits |= ks.x | vs.x;
          const uint32_t k[4] = {ks.x, ks.y, ks.z, ks.w};
          v[u][0] = valid ? vs.x : 0, v[u][1] = valid ? vs.y : 0, v[u][2] = valid ? vs.z : 0, v[u][3] = valid ? vs.w : 0;
          float s = 0.0f;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack2<bf16>(k[i]);
            s += pair.x * q[2 * i];
            s += pair.y * q[2 * i + 1];
          }
#pragma unroll
          for (int m = 1; m < 8; m *= 2) s += __shfl_xor_sync(0xffffffffu, s, m);
          score[u] = valid ? s : -INFINITY;
        }
        const float new_top = fmaxf(top, fmaxf(score[0], score[1]));
        const float from = new_top == -INFINITY ? 0.0f : new_top;
        const float keep = ptx::exp2_approx(top - from);
        const float weight[2] = {ptx::exp2_approx(score[0] - from), ptx::exp2_approx(score[1] - from)};
        top = new_top;
        sum = sum * keep + (weight[0] + weight[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 a = unpack2<bf16>(v[0][i]), b = unpack2<bf16>(v[1][i]);
          out[2 * i] = out[2 * i] * keep + (weight[0] * a.x + weight[1] * b.x);
          out[2 * i + 1] = out[2 * i + 1] * keep + (weight[0] * a.y + weight[1] * b.y);
        }
      }
      ring.template release<1>(lane, bits & zero);
    }
    if (8 * share >= n) return;
    float all = top;  // the four keys at a time become one
#pragma unroll
    for (int m = 8; m < 32; m *= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, m));
    const float factor = ptx::exp2_approx(top - all);
    sum *= factor;
#pragma unroll
    for (int m = 8; m < 32; m *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, m);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] *= factor;
#pragma unroll
      for (int m = 8; m < 32; m *= 2) out[i] += __shfl_xor_sync(0xffffffffu, out[i], m);
    }
    if (quarter == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<float2*>(slot + 8 * eighth + 2 * i) = make_float2(out[2 * i], out[2 * i + 1]);
    }
    if (lane == 0) *reinterpret_cast<float2*>(slot + S::head_dim) = make_float2(all, sum);
  }

  /// Which eighth of a chunk of row r's keys this warp takes: rows with few keys are spread over the warps.
  __device__ __forceinline__ int share_of(int r) const { return (warp + 4 * r + r / 2 * 2) % S::warps; }

  /// The last CTA of a head also has the new keys, from the packets, in a slot of their own.
  __device__ __forceinline__ void attend() {
    uint2 word[3 * kRows];  // lane's words of q, k, v of each row
    auto has_new_key = [&](int r) { return part == S::group - 1 && share_of(r) == S::warps - 1; };
    receive(
        word, mailbox<const uint2>(M::heads_qkv) + head * M::kMaxRows * 96 + lane, tag, [](int j) { return j * 32; },
        [&](int j) {
          const int r = j / 3;
          return r < rows && (has_new_key(r) || (j % 3 == 0 && 8 * share_of(r) < keys[r]));
        });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float* slots = sums_b + r * S::slots * S::slot_floats;
      if (r < rows && has_new_key(r)) {
        const float2 q = unpack2<bf16>(word[3 * r].x), k = unpack2<bf16>(word[3 * r + 1].x);
        float score = (q.x * k.x + q.y * k.y) * (p.softmax_scale * 1.44269504f);
#pragma unroll
        for (int m = 1; m < 32; m *= 2) score += __shfl_xor_sync(0xffffffffu, score, m);
        float* slot = slots + S::warps * S::slot_floats;
        *reinterpret_cast<float2*>(slot + 2 * lane) = unpack2<bf16>(word[3 * r + 2].x);
        if (lane == 0) *reinterpret_cast<float2*>(slot + S::head_dim) = make_float2(score, 1.0f);
      }
      if (keys[r] > 0) attend_row(word[3 * r].x, keys[r], share_of(r), slots);
    }
  }

  /// Merges the warps' slots and sends this CTA's part of the row's attention.
  __device__ __forceinline__ void send_part() {
    for (int row = warp; row < rows; row += S::warps) {
      int n = keys[0];
#pragma unroll
      for (int r = 1; r < kRows; ++r) n = r == row ? keys[r] : n;
      const int used = min(S::warps, (n + 7) / 8);
      const float* slots = sums_b + row * S::slots * S::slot_floats;
      float2 state[S::slots], out[S::slots];
      float top = -INFINITY;
#pragma unroll
      for (int s = 0; s < S::slots; ++s) {
        const bool is_used = s < S::warps ? s < used : part == S::group - 1;
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
      const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
      const uint32_t lse = __float_as_uint(sum == 0.0f ? -INFINITY : top + log2f(sum));
      const uint32_t word = pack2<bf16>(x * scale, y * scale);
      uint32_t words[3];
#pragma unroll
      for (int m = 0; m < 3; ++m) words[m] = __shfl_sync(0xffffffffu, word, min(3 * lane + m, 31));
      if (lane < M::part_packets) {
        uint4* to = mailbox<uint4>(M::parts) + (row * S::ctas + cta) * M::part_packets + lane;
        store_packet(to, words[0], words[1], lane == M::part_packets - 1 ? lse : words[2], tag);
      }
    }
  }

  /// Merges the 8 parts of a row's head to inputs of the output projection, in the staging of warp `row`: 11 lanes for even
  /// parts and 11 for odd ones, 6 outputs a lane.
  __device__ __forceinline__ void receive_parts() {
    constexpr int kPackets = M::part_packets, kParts = S::group / 2;
    const int side = lane < kPackets ? 0 : 1, k = lane - side * kPackets;
    for (int row = warp; row < rows; row += S::warps) {
      uint4 v[kParts];
      receive(
          v, mailbox<const uint4>(M::parts) + (row * S::ctas + head * S::group + side) * kPackets + k, tag,
          [](int j) { return 2 * j * kPackets; }, [&](int) { return lane < 2 * kPackets; });
      float share[kParts], top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        share[j] = __uint_as_float(__shfl_sync(0xffffffffu, v[j].z, side * kPackets + kPackets - 1));
        top = fmaxf(top, share[j]);
      }
      const int other = side == 0 ? lane + kPackets : lane - kPackets;
      top = fmaxf(top, __shfl_sync(0xffffffffu, top, other));
      float sum = 0.0f, out[6] = {};
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        share[j] = ptx::exp2_approx(share[j] - top);
        sum += share[j];
        const float2 a = unpack2<bf16>(v[j].x), b = unpack2<bf16>(v[j].y), c = unpack2<bf16>(v[j].z);
        out[0] += share[j] * a.x;
        out[1] += share[j] * a.y;
        out[2] += share[j] * b.x;
        out[3] += share[j] * b.y;
        out[4] += share[j] * c.x;
        out[5] += share[j] * c.y;
      }
      sum += __shfl_sync(0xffffffffu, sum, other);
#pragma unroll
      for (int m = 0; m < 6; ++m) out[m] += __shfl_sync(0xffffffffu, out[m], other);
      const float scale = 1.0f / sum;
      if (lane < kPackets) {
        uint32_t* to = attended + row * 32;
        to[staged(3 * k)] = pack2<bf16>(out[0] * scale, out[1] * scale);
        to[staged(3 * k + 1)] = pack2<bf16>(out[2] * scale, out[3] * scale);
        if (k < kPackets - 1) to[staged(3 * k + 2)] = pack2<bf16>(out[4] * scale, out[5] * scale);
      }
    }
  }

  /// This head's share of 16 outputs a warp, to the outputs' owners.
  __device__ __forceinline__ void send_projected(const uint32_t (&w)[1][16]) {
    float d[4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 x = load_inputs<S>(attended, 32, i, lane);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int s = 2 * i + u;
        const uint32_t a[4] = {w[0][2 * s], w[0][8 + 2 * s], w[0][2 * s + 1], w[0][8 + 2 * s + 1]};
        ptx::mma_m16n8k16<bf16>(d, a, u == 0 ? x.x : x.z, u == 0 ? x.y : x.w);
      }
    }
    const int row = 2 * (lane % 4), owner = part * S::heads + 2 * warp;
    auto to = [&](int r, int c) {
      return mailbox<uint2>(M::projected) + ((r * S::ctas + owner + c) * S::heads + head) * 8 + lane / 4;
    };
    if (row < rows) {
      store_packet(to(row, 0), __float_as_uint(d[0]), tag);
      store_packet(to(row, 1), __float_as_uint(d[2]), tag);
    }
    if (row + 1 < rows) {
      store_packet(to(row + 1, 0), __float_as_uint(d[1]), tag);
      store_packet(to(row + 1, 1), __float_as_uint(d[3]), tag);
    }
  }

  /// Two heads' shares of this CTA's 8 outputs, a lane each and two rows at a time, to sums_a (warps, rows, 8).
  __device__ __forceinline__ void receive_projected() {
    constexpr int kN = (kRows + 1) / 2;
    uint2 v[kN];
    receive(
        v, mailbox<const uint2>(M::projected) + ((lane / 16 * S::ctas + cta) * S::heads + 2 * warp) * 8 + lane % 16, tag,
        [](int j) { return 2 * j * S::ctas * S::heads * 8; }, [&](int j) { return 2 * j + lane / 16 < rows; });
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int row = 2 * j + lane / 16;
      float y = __uint_as_float(v[j].x);
      y += __shfl_xor_sync(0xffffffffu, y, 8);
      if (row < kRows && lane % 16 < 8) sums_a[(warp * kRows + row) * S::row_a + lane % 8] = y;
    }
  }

  /// 1 / rms of the row whose sums (warps, 64 and the sum of squares) these are.
  __device__ __forceinline__ float inverse_rms(const float* sums) const {
    return rsqrtf(sum_over_warps<S, S::row_b>(sums + S::row_b - 1) * (1.0f / S::hidden) + p.eps);
  }

  /// silu(gate) * up of this CTA's 32 intermediate values, in the order of staging.
  __device__ __forceinline__ void send_gated() {
    for (int row = warp; row < rows; row += S::warps) {
      const float* sums = sums_b + row * S::row_b;
      const float scale = inverse_rms(sums);
      const float gate = sum_over_warps<S, S::row_b>(sums + lane) * scale;
      const float up = sum_over_warps<S, S::row_b>(sums + 32 + lane) * scale;
      const float y = gate / (1.0f + __expf(-gate)) * up;
      const uint32_t word = pack2<bf16>(y, __shfl_xor_sync(0xffffffffu, y, 1));
      uint32_t words[3];
#pragma unroll
      for (int m = 0; m < 3; ++m) {
        const int at = min(3 * lane + m, 15);  // place in staging: word at / 4 + at % 4 * 4
        words[m] = __shfl_sync(0xffffffffu, word, 2 * (at / 4 + at % 4 * 4));
      }
      if (lane < M::gated_packets) {
        store_packet(mailbox<uint4>(M::gated) + (row * S::ctas + cta) * M::gated_packets + lane, words[0], words[1],
                     words[2], tag);
      }
    }
  }

  /// Inputs 512 * warp ... of down: from 16 CTAs, in `passes`.
  __device__ __forceinline__ void receive_gated(int pass) {
    constexpr int kN = 3 / S::passes + (3 % S::passes != 0), kPackets = 16 / S::passes * M::gated_packets;
    const uint4* from = mailbox<const uint4>(M::gated) + (16 * warp + 16 / S::passes * pass) * M::gated_packets + lane;
    auto wanted = [&](int j) { return lane + 32 * j < kPackets; };
    uint4 v[kN * kRows];
    receive(
        v, from, tag, [](int j) { return j / kN * S::ctas * M::gated_packets + j % kN * 32; },
        [&](int j) { return wanted(j % kN) && j / kN < rows; });
#pragma unroll
    for (int j = 0; j < kN * kRows; ++j) {
      const int i = lane + 32 * (j % kN), k = i % M::gated_packets;
      uint32_t* to = staging + j / kN * S::gated_words + i / M::gated_packets * 16 + 3 * k;
      if (wanted(j % kN)) {
        to[0] = v[j].x;
        if (k < M::gated_packets - 1) {
          to[1] = v[j].y;
          to[2] = v[j].z;
        }
      }
    }
    __syncwarp();
  }

  /// Outputs of eight tiles to sums_b (warps, rows, 64).
  __device__ __forceinline__ void multiply_eight(const uint32_t (&w)[8][16]) {
    float d[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 x = load_inputs<S>(staging, 64, i, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(d[n], w[2 * n], w[2 * n + 1], 2 * i, x.x, x.y);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(d[n], w[2 * n], w[2 * n + 1], 2 * i + 1, x.z, x.w);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) store_sums<S, S::row_b, true>(sums_b, warp, lane, 16 * n, d[n]);
  }

  __device__ __forceinline__ void multiply_qkv(const uint32_t (&w)[3][16]) {
    float qk[2][4] = {}, v[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 x = load_inputs<S>(staging, 64, i, lane);
      multiply(qk[0], w[0], w[1], 2 * i, x.x, x.y);
      multiply(v[0], w[2], 2 * i, x.x, x.y);
      multiply(qk[1], w[0], w[1], 2 * i + 1, x.z, x.w);
      multiply(v[1], w[2], 2 * i + 1, x.z, x.w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      qk[0][i] += qk[1][i];
      v[0][i] += v[1][i];
    }
    store_sums<S, S::row_a, true>(sums_a, warp, lane, 0, qk[0]);
    store_sums<S, S::row_a, false>(sums_a, warp, lane, 16, v[0]);
  }

  __device__ __forceinline__ void store_down(float (&d)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
    store_sums<S, S::row_c, false>(sums_c, warp, lane, 0, d[0]);
  }

  __device__ __forceinline__ void logits() {
    const int tiles = static_cast<int>((p.vocab + 7) / 8);
    for (int tile = cta; tile < tiles; tile += 8 * S::ctas) {
      const int n = min(8, (tiles - tile + S::ctas - 1) / S::ctas);
      uint32_t w[8][16];
      // Stages past the n-th hold old weights, whose products nobody reads.
      for (int i = 0; i < n; ++i) ring.wait_full(i);
      __syncwarp();
      const uint32_t bits = load_weights(ring, 0, 2 * warp, lane, w);
      for (int i = 0; i < n; ++i) ring.template release<1>(lane, bits & zero);
      if (tile != cta) synchronize();  // the sums before have been read
      multiply_eight(w);
      synchronize();
      for (int row = warp; row < rows; row += S::warps) {
        const float* sums = sums_b + row * S::row_b;
        const float scale = inverse_rms(sums);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int output = lane + 32 * side, at = 8 * (tile + output / 8 * S::ctas) + output % 8;
          const float y = sum_over_warps<S, S::row_b>(sums + output) * scale;
          if (output / 8 < n && at < p.vocab) p.logits[row * p.vocab + at] = y;
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    const int layers = static_cast<int>(p.layers);
    uint32_t* counter = mailbox<uint32_t>(M::counter);
    const uint32_t step = *const_cast<volatile uint32_t*>(counter);
    tag = step * static_cast<uint32_t>(layers + 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      keys[r] = 0;
      if (r < rows) {
        const int length = cache_row(p, r).length;
        keys[r] = first_key<S>(part + 1, length) - first_key<S>(part, length);
      }
    }
    CacheRow cached[kWarpRows];                // of the rows that this warp finishes
    float cosine[kWarpRows], sine[kWarpRows];  // of this lane's rotary pair
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int row = warp + i * S::warps;
      cosine[i] = sine[i] = 0.0f;
      cached[i] = CacheRow{0, 0, false};
      if (row < rows) {
        cached[i] = cache_row(p, row);
        const int64_t at = clamp_index(p.cache_seqlens[row], p.rotary_positions) * 32 + 4 * part + lane % 4;
        const bool fp32 = p.rotary_dtype == DType::kFloat32;
        cosine[i] =
            fp32 ? static_cast<const float*>(p.rotary_cos)[at] : to_float(static_cast<const bf16*>(p.rotary_cos)[at]);
        sine[i] = fp32 ? static_cast<const float*>(p.rotary_sin)[at] : to_float(static_cast<const bf16*>(p.rotary_sin)[at]);
      }
    }
    const bf16* input_norm = static_cast<const bf16*>(p.input_norm) + 8 * cta + lane % 8;
    const bf16* post_norm = static_cast<const bf16*>(p.post_norm) + 8 * cta + lane % 8;
    const bf16* final_norm = static_cast<const bf16*>(p.norm) + 8 * cta + lane % 8;

#pragma unroll 1
    for (int layer = 0; layer < layers; ++layer) {
      // Long before they are used: these come from memory.
      const float gain_post = to_float(post_norm[layer * S::hidden]);
      const float gain_next = to_float(layer + 1 < layers ? input_norm[(layer + 1) * S::hidden] : *final_norm);
      {
        uint32_t w[3][16];
        ring.template wait_full<3>();
        ring.template release<3>(lane, load_weights(ring, 0, 2 * warp, lane, w) & zero);
        if (layer == 0) {
          embed();
        } else {
          receive_inputs<S::row_a>(M::x_down, sums_a);
        }
        ++tag;
        multiply_qkv(w);
      }
      synchronize();
      send_heads(layer, cached, cosine, sine);
      attend();
      synchronize();
      send_part();
      {
        uint32_t w[1][16];
        ring.template wait_full<1>();
        ring.template release<1>(lane, load_weights(ring, 0, 2 * warp, lane, w) & zero);
        receive_parts();
        synchronize();
        send_projected(w);
        receive_projected();
      }
      synchronize();
      send_residual<S::row_a>(sums_a, M::x_out, gain_post);
      {
        uint32_t w[8][16];
        ring.template wait_full<8>();
        ring.template release<8>(lane, load_weights(ring, 0, 2 * warp, lane, w) & zero);
        receive_inputs<S::row_b>(M::x_out, sums_b);
        multiply_eight(w);
      }
      synchronize();
      send_gated();
      {
        uint32_t w[8 / kDownBlocks][8 * kDownBlocks];
        ring.template wait_full<4>();
        ring.template release<4>(lane, load_weights(ring, 8 * warp / S::heads, 8 * warp % S::heads, lane, w) & zero);
        float d[4][4] = {};
#pragma unroll
        for (int pass = 0; pass < S::passes; ++pass) {
          receive_gated(pass);
#pragma unroll
          for (int i = 0; i < 16 / S::passes; ++i) {
            const uint4 x = load_inputs<S>(staging, S::gated_words, i, lane);
            const int s = 2 * (pass * 16 / S::passes + i);
            constexpr int kSteps = 4 * kDownBlocks;
            multiply(d[s % 4], w[s / kSteps], s % kSteps, x.x, x.y);
            multiply(d[s % 4 + 1], w[s / kSteps], s % kSteps + 1, x.z, x.w);
          }
          __syncwarp();
        }
        store_down(d);
      }
      synchronize();
      send_residual<S::row_c>(sums_c, M::x_down, gain_next);
    }
    receive_inputs<S::row_b>(M::x_down, sums_b);
    logits();
    // Every CTA has read the counter: it has been heard of since. It restarts before sequence numbers could come to 0.
    if (cta == 0 && threadIdx.x == 0) *counter = (step + 1) & 0xffffff;
  }
};

}  // namespace vivace::step
