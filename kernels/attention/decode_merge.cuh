// The end of a run of attention_decode: the warps' states become one result, and the results of CTAs that share a batch
// entry become the output, without a second launch, without a fence and without memory that must be cleared before.
//
// A part's result travels in packets of 16 bytes: {two outputs, number of the launch}, and {log2-sum-exp, 0, number} for a
// row. 16 bytes are written and read as one, so that a packet that carries the launch's number is complete; the numbers of
// launches never repeat. The CTA that has an entry's last part reads all parts' packets in their order, waiting for those
// that are not there yet, and clears their numbers (a captured graph runs again with the same number). It waits for CTAs of
// lower index only, which have started before it, and only when it has nothing else left to do.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention/decode_plan.cuh"
#include "kernels/attention/decode_tile.cuh"

namespace vivace {

template <typename T, int kDim, int kTiles, int kWarps>
struct DecodeMerge {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPasses = kDim / 64 * kTiles;  // over the dims, so that the buffer stays small
  static constexpr int kPassDims = kDim / kPasses;
  static constexpr int kPitch = kPassDims + 4;  // no bank conflict between the four lanes of a row pair

  /// Floats of shared memory for `rows` query rows.
  static constexpr int buffer_floats(int rows) { return kWarps * rows * (kPitch + 2); }

  const DecodeArgs& args;
  const Sequence& seq;
  const DecodeRows& unit;
  int head0;  // of the unit's group
  bool probed;

  __device__ __forceinline__ DecodeMerge(const DecodeArgs& a, const Sequence& s, const DecodeRows& u, int head)
      : args(a), seq(s), unit(u), head0(head) {
    const int probe_head = static_cast<int>(args.params.probe_head);
    probed = args.params.probe != nullptr && probe_head >= head0 && probe_head < head0 + args.group;
  }

  /// log2(2^lse + 2^sink); a row that sees nothing stays so.
  __device__ __forceinline__ float with_sink(int r, float lse) const {
    if (args.params.sinks == nullptr || lse == -INFINITY) return lse;
    const float sink = args.params.sinks[head0 + unit.head(r)] * kLog2E, top = fmaxf(lse, sink);
    return top + log2f(ptx::exp2_approx(lse - top) + ptx::exp2_approx(sink - top));
  }

  /// out: of dims d and d + 1 of row r, normalised by lse, which is of the keys alone.
  __device__ __forceinline__ void store(int r, int d, const float (&out)[2], float lse) const {
    const AttentionParams& p = args.params;
    const float all = with_sink(r, lse);
    const float scale = all != lse ? ptx::exp2_approx(lse - all) : 1.0f;
    const int i = unit.query(r), head = head0 + unit.head(r);
    T* to = static_cast<T*>(p.out) + seq.out_offset + i * p.out_stride[1] + head * p.out_stride[2] + d;
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(out[0] * scale, out[1] * scale);
    if (d == 0 && p.lse != nullptr) p.lse[seq.lse_offset + head * seq.lse_head_stride + i] = all * kLn2;
  }

  /// Turns the scores that the tiles have left in probe into probabilities; `threads` threads, this one is `thread`.
  __device__ __forceinline__ void finish_probe(int r, float lse, int thread, int threads) const {
    const AttentionParams& p = args.params;
    if (head0 + unit.head(r) != p.probe_head) return;
    const int i = unit.query(r);
    const int64_t row = i - (seq.queries - p.probe_rows);
    if (row < 0 || row >= p.probe_rows) return;
    const float all = with_sink(r, lse);
    const VisibleKeys visible(seq, args.window, i);
    float* to = p.probe + (seq.batch * p.probe_rows + row) * p.probe_capacity;
    const int capacity = static_cast<int>(p.probe_capacity);
    constexpr int kAtOnce = 4;
    for (int first = thread; first < capacity; first += kAtOnce * threads) {
      float x[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int key = first + e * threads;
        x[e] = key < capacity && visible.contains(key) ? __ldcg(to + key) : -INFINITY;
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        const int key = first + e * threads;
        if (key < capacity) to[key] = x[e] == -INFINITY ? 0.0f : ptx::exp2_approx(x[e] - all);
      }
    }
  }

  /// Rows of probe for queries that do not exist, by the unit that has the probed head's first row.
  __device__ __forceinline__ void clear_probe() const {
    const AttentionParams& p = args.params;
    if (unit.row0 != 0 || !probed) return;
    const int missing = static_cast<int>(min(max(p.probe_rows - seq.queries, int64_t{0}), p.probe_rows));
    float* to = p.probe + seq.batch * p.probe_rows * p.probe_capacity;
    for (int64_t at = threadIdx.x; at < missing * p.probe_capacity; at += kThreads) to[at] = 0.0f;
  }

  /// Packets of a part: rows of dim_v / 2 with outputs and one with the log2-sum-exp.
  template <typename Plan>
  __device__ __forceinline__ char* packet(const Plan& plan, const DecodeRun& run, int part, int unit_index, int r,
                                          int pair) const {
    const int64_t slot = int64_t{plan.slot(run, part)} * args.units + unit_index;
    const int pitch = static_cast<int>(args.params.head_dim_v) / 2 + 1;
    return static_cast<char*>(args.packets) + ((slot * args.rows + r) * pitch + pair) * 16;
  }

  template <typename Plan, typename State>
  __device__ __forceinline__ void finish(const Plan& plan, const DecodeRun& run, int unit_index, State& state,
                                         float* buffer) const {
    const AttentionParams& p = args.params;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = unit.rows;
    const int dim_v = static_cast<int>(p.head_dim_v);
    const bool whole = run.parts <= 1;
    const bool last = run.part == run.part0 + run.parts - 1;
    float2* stats = reinterpret_cast<float2*>(buffer + kWarps * rows * kPitch);  // (warp, row): maximum, sum

#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        state.sum[n][j] = State::over_keys(state.sum[n][j], [](float a, float b) { return a + b; });
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      __syncthreads();  // nobody reads the buffer any more
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int r = 8 * n + 2 * (lane % 4) + j;
          if (r >= rows) continue;
          float* to = buffer + (warp * rows + r) * kPitch + lane / 4;
#pragma unroll
          for (int m = 0; m < kPassDims / 16; ++m) {
            to[16 * m] = state.out[pass * (kPassDims / 16) + m][n][j];
            to[16 * m + 8] = state.out[pass * (kPassDims / 16) + m][n][2 + j];
          }
          if (pass == 0 && lane < 4) stats[warp * rows + r] = make_float2(state.max[n][j], state.sum[n][j]);
        }
      }
      __syncthreads();
      if (pass == 0 && probed && !whole) __threadfence();  // the scores come before the packets
#pragma unroll 1
      for (int at = threadIdx.x; at < rows * (kPassDims / 2); at += kThreads) {
        const int r = at / (kPassDims / 2), d = at % (kPassDims / 2) * 2, dim = pass * kPassDims + d;
        float out[2];
        const float lse = merge_warps(stats, buffer + d, r, out);
        if (dim >= dim_v) continue;
        if (whole) {
          store(r, dim, out, lse);
        } else {
          ptx::st_relaxed_b128(packet(plan, run, run.part, unit_index, r, dim / 2), out[0], out[1], args.launch);
          if (dim == 0) {
            ptx::st_relaxed_b128(packet(plan, run, run.part, unit_index, r, dim_v / 2), lse, 0.0f, args.launch);
          }
        }
      }
    }
    if (probed && last) clear_probe();
    if (whole && probed) {
      for (int r = 0; r < rows; ++r) {
        float unused[2];
        finish_probe(r, merge_warps(stats, nullptr, r, unused), static_cast<int>(threadIdx.x), kThreads);
      }
    }
  }

  /// Merges all parts of the entry that `run`, its last part, belongs to.
  template <typename Plan>
  __device__ __forceinline__ void merge_parts(const Plan& plan, const DecodeRun& run, int unit_index) const {
    const int pairs = static_cast<int>(args.params.head_dim_v) / 2, row_bytes = (pairs + 1) * 16;
    const int64_t slot_bytes = int64_t{args.units} * args.rows * row_bytes, step = slot_bytes * (args.fixed ? 1 : 2);
    char* const part0 = packet(plan, run, run.part0, unit_index, 0, 0);
    const auto at_packet = [&](int part, int r, int pair) {
      return part0 + (part == 0 ? 0 : part * step - (step - slot_bytes)) + r * row_bytes + pair * 16;
    };
#pragma unroll 1
    for (int first = threadIdx.x; first < unit.rows * pairs; first += kAtOnce * kThreads) {
      float largest[kAtOnce], sum[kAtOnce], out[kAtOnce][2];
      int row[kAtOnce], pair[kAtOnce];
      bool used[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        row[e] = (first + e * kThreads) / pairs;
        pair[e] = first + e * kThreads - row[e] * pairs;
        used[e] = row[e] < unit.rows;
        largest[e] = -INFINITY;
        sum[e] = out[e][0] = out[e][1] = 0.0f;
      }
#pragma unroll 1
      for (int part = 0; part < run.parts; part += kPartsAtOnce) {
        ptx::Packet in[kAtOnce][kPartsAtOnce], stat[kAtOnce][kPartsAtOnce];
        const long long start = clock64();
        bool complete;
        do {
          complete = true;
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) {
#pragma unroll
            for (int i = 0; i < kPartsAtOnce; ++i) {
              if (!used[e] || part + i >= run.parts) continue;
              in[e][i] = ptx::ld_relaxed_b128(at_packet(part + i, row[e], pair[e]));
              stat[e][i] = ptx::ld_relaxed_b128(at_packet(part + i, row[e], pairs));
            }
          }
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) {
#pragma unroll
            for (int i = 0; i < kPartsAtOnce; ++i) {
              if (!used[e] || part + i >= run.parts) continue;
              complete = complete && in[e][i].launch == args.launch && stat[e][i].launch == args.launch;
            }
          }
          if (clock64() - start > kPatience) __trap();
        } while (!complete);
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
#pragma unroll
          for (int i = 0; i < kPartsAtOnce; ++i) {
            if (!used[e] || part + i >= run.parts) continue;
            ptx::st_relaxed_b128(at_packet(part + i, row[e], pair[e]), 0.0f, 0.0f, 0);
            const float lse = stat[e][i].x, top = fmaxf(largest[e], lse), offset = top == -INFINITY ? 0.0f : top;
            const float old = ptx::exp2_approx(largest[e] - offset), mine = ptx::exp2_approx(lse - offset);
            sum[e] = sum[e] * old + mine;
            out[e][0] = out[e][0] * old + mine * in[e][i].x;
            out[e][1] = out[e][1] * old + mine * in[e][i].y;
            largest[e] = top;
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (!used[e]) continue;
        const bool empty = largest[e] == -INFINITY;
        const float scale = empty ? 0.0f : 1.0f / sum[e];
        const float merged[2] = {out[e][0] * scale, out[e][1] * scale};
        store(row[e], 2 * pair[e], merged, empty ? -INFINITY : largest[e] + log2f(sum[e]));
      }
    }
    if (probed) {
      for (int r = 0; r < unit.rows; ++r) {
        const float lse = merged_lse(at_packet, run.parts, r, pairs);
        __threadfence();  // the scores of the other CTAs came before their packets
        finish_probe(r, lse, static_cast<int>(threadIdx.x), kThreads);
      }
    }
    __syncthreads();  // all have read the rows' packets
    for (int at = threadIdx.x; at < unit.rows * run.parts; at += kThreads) {
      const int part = at / unit.rows;
      ptx::st_relaxed_b128(at_packet(part, at - part * unit.rows, pairs), 0.0f, 0.0f, 0);
    }
  }

 private:
  static constexpr int kAtOnce = kTiles == 1 && kDim == 64 ? 1 : 2;  // outputs of a thread, so that their reads overlap
  static constexpr int kPartsAtOnce = 8 / kAtOnce;
  static constexpr long long kPatience = 1ll << 34;  // cycles, seconds: something is wrong then

  /// The packet at `at` once it carries the launch's number. Some CTA of lower index writes it.
  __device__ __forceinline__ ptx::Packet await(const void* at) const {
    const long long start = clock64();
    for (;;) {
      const ptx::Packet x = ptx::ld_relaxed_b128(at);
      if (x.launch == args.launch) return x;
      if (clock64() - start > kPatience) __trap();
    }
  }

  template <typename AtPacket>
  __device__ __forceinline__ float merged_lse(const AtPacket& at_packet, int parts, int r, int pairs) const {
    float largest = -INFINITY, sum = 0.0f;
    for (int part = 0; part < parts; ++part) {
      const float lse = await(at_packet(part, r, pairs)).x, top = fmaxf(largest, lse);
      const float offset = top == -INFINITY ? 0.0f : top;
      sum = sum * ptx::exp2_approx(largest - offset) + ptx::exp2_approx(lse - offset);
      largest = top;
    }
    return largest == -INFINITY ? -INFINITY : largest + log2f(sum);
  }

  /// Of row r: the log2-sum-exp, and two outputs from the columns `outs` of the buffer, in the order of the warps.
  __device__ __forceinline__ float merge_warps(const float2* stats, const float* outs, int r, float (&out)[2]) const {
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, stats[w * unit.rows + r].x);
    const float offset = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f;
    out[0] = out[1] = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 stat = stats[w * unit.rows + r];
      const float weight = ptx::exp2_approx(stat.x - offset);
      sum += weight * stat.y;
      if (outs != nullptr) {
        const float2 o = *reinterpret_cast<const float2*>(outs + (w * unit.rows + r) * kPitch);
        out[0] += weight * o.x;
        out[1] += weight * o.y;
      }
    }
    if (largest == -INFINITY) return -INFINITY;
    out[0] /= sum;
    out[1] /= sum;
    return offset + log2f(sum);
  }
};

}  // namespace vivace
