// Attention of a few queries over many keys, for the plain call: every query
// sees every key of its row. Bound by memory and, where the cache is small, by
// the latency of a launch: so little code, few parameters, and as little as can
// be between them and the first keys.
//
// A CTA of 4 to 8 warps takes one part of one (batch entry, kv head). Keys and
// values go from memory straight into registers, see decode_direct_tile.cuh; a
// register that a product has used is loaded anew at once, so that a warp has
// most of a tile of 8 KiB under way all the time, 64 to 128 KiB on a
// multiprocessor. There are as many CTAs as it takes, and the hardware gives
// them out: a slow one delays nobody.
//
// Parts of an entry take its tiles in turn (or, under split_keys, equal
// pieces), so that the address of a CTA's first tile does not depend on the
// length: keys and values are requested before the length has arrived, and what
// lies behind it is discarded. Parts meet in packets of 16 bytes, as
// decode_merge.cuh says; the CTA with an entry's last part merges them.
#pragma once

#include <cstdint>

#include "kernels/attention/decode_direct_append.cuh"
#include "kernels/attention/decode_direct_args.cuh"
#include "kernels/attention/decode_direct_prefetch.cuh"
#include "kernels/attention/decode_direct_tile.cuh"
#include "kernels/attention/direct_shape.h"

namespace vivace {

template <typename T, int kDim, int kWarps>
struct DirectMerge {
  static constexpr int kPairs = kDim / 2, kPitch = kDim + 4, kThreads = 32 * kWarps;

  /// Of shared memory: the warps' states.
  static constexpr int shared_bytes(int rows) { return kWarps * rows * (kPitch + 2) * 4; }

  const DirectArgs& args;
  int head_kv, part, batch;
  char* out;      // of the kv head's first query head
  float* buffer;  // (warp, row, kPitch)
  float2* stats;  // (warp, row)

  __device__ __forceinline__ DirectMerge(const DirectArgs& a, int h, int p, int b, void* shared)
      : args(a), head_kv(h), part(p), batch(b), buffer(static_cast<float*>(shared)) {
    stats = reinterpret_cast<float2*>(buffer + kWarps * args.rows * kPitch);
    out =
        stepped(stepped(args.out, batch, args.out_batch), head_kv * static_cast<int>(args.by_group.divisor), args.out_head);
    // Parameters come from memory as well: those of the end now, while the keys
    // are on their way.
    asm volatile("" : "+l"(out));
  }

  /// {two outputs, launch}; {log2-sum-exp, 0, launch} where pair is kPairs.
  __device__ __forceinline__ char* packet(int of, int r, int pair) const {
    const int64_t unit = (static_cast<int64_t>(batch) * gridDim.y + of) * gridDim.x + head_kv;
    return args.packets + ((unit * args.rows + r) * (kPairs + 1) + pair) * 16;
  }

  __device__ __forceinline__ void store(int r, int pair, float o0, float o1, float lse) const {
    int query, head;
    args.by_group(r, query, head);
    reinterpret_cast<uint32_t*>(stepped(stepped(out, query, args.out_row), head, args.out_head))[pair] = pack2<T>(o0, o1);
    if (pair == 0 && args.lse != nullptr) {
      head += head_kv * static_cast<int>(args.by_group.divisor);
      args.lse[(static_cast<int64_t>(batch) * args.heads + head) * args.seqlen_q + query] = lse * kLn2;
    }
  }

  /// The warps' states, in their order, become the output, a part's packets,
  /// or, in the CTA that merges, its own part.
  __device__ __forceinline__ void merge_warps(bool last) const {
    const int rows = args.rows;
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * kPairs; at += kThreads) {
      const int r = at / kPairs, pair = at % kPairs;
      float largest = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, stats[w * rows + r].x);
      const float offset = largest == -INFINITY ? 0.0f : largest;
      float sum = 0.0f, o0 = 0.0f, o1 = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 stat = stats[w * rows + r];
        const float2 o = *reinterpret_cast<const float2*>(buffer + (w * rows + r) * kPitch + 2 * pair);
        const float weight = ptx::exp2_approx(stat.x - offset);
        sum = fmaf(weight, stat.y, sum);
        o0 = fmaf(weight, o.x, o0);
        o1 = fmaf(weight, o.y, o1);
      }
      const bool empty = largest == -INFINITY;
      const float inverse = empty ? 0.0f : ptx::rcp_approx(sum), lse = empty ? -INFINITY : offset + ptx::log2_approx(sum);
      o0 *= inverse;
      o1 *= inverse;
      if (!last) {
        ptx::st_relaxed_b128(packet(part, r, pair), o0, o1, args.launch);
        if (pair == 0) ptx::st_relaxed_b128(packet(part, r, kPairs), lse, 0.0f, args.launch);
      } else if (part == 0) {
        store(r, pair, o0, o1, lse);
      } else {  // where nobody else reads any more
        float* const mine = buffer + r * kPitch + 2 * pair;
        *reinterpret_cast<float2*>(mine) = make_float2(o0, o1);
        mine[rows * kPitch] = lse;
      }
    }
  }

  /// This part, the last, and the packets of all others, in their order, become
  /// the output. Their CTAs have a lower index: they have started, and wait for
  /// nobody.
  __device__ __forceinline__ void merge_parts() const {
    constexpr int kAtOnce = 8;
    constexpr long long kPatience = 1ll << 34;  // cycles, seconds: something is wrong then
    const int rows = args.rows;
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * kPairs; at += kThreads) {
      const int r = at / kPairs, pair = at % kPairs;
      const float* const mine = buffer + r * kPitch + 2 * pair;
      float o0 = mine[0], o1 = mine[1], largest = mine[rows * kPitch], sum = largest == -INFINITY ? 0.0f : 1.0f;
#pragma unroll 1
      for (int first = 0; first < part; first += kAtOnce) {
        ptx::Packet in[kAtOnce], stat[kAtOnce];
        const long long start = clock64();
        bool complete;
        do {
          complete = true;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int other = min(first + i, part - 1);
            in[i] = ptx::ld_relaxed_b128(packet(other, r, pair));
            stat[i] = ptx::ld_relaxed_b128(packet(other, r, kPairs));
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            complete = complete && in[i].launch == args.launch && stat[i].launch == args.launch;
          }
          if (clock64() - start > kPatience) __trap();
        } while (!complete);
        float top = largest;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= part) stat[i].x = -INFINITY;
          top = fmaxf(top, stat[i].x);
        }
        const float offset = top == -INFINITY ? 0.0f : top, old = ptx::exp2_approx(largest - offset);
        largest = top;
        sum *= old;
        o0 *= old;
        o1 *= old;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const float weight = ptx::exp2_approx(stat[i].x - offset);
          sum += weight;
          o0 = fmaf(weight, in[i].x, o0);
          o1 = fmaf(weight, in[i].y, o1);
        }
      }
      const bool empty = largest == -INFINITY;
      const float inverse = empty ? 0.0f : ptx::rcp_approx(sum);
      store(r, pair, o0 * inverse, o1 * inverse, empty ? -INFINITY : largest + ptx::log2_approx(sum));
    }
    // A captured graph runs again with the same number.
    __syncthreads();
    const int packets = rows * (kPairs + 1);
#pragma unroll 1
    for (int other = 0; other < part; ++other) {
#pragma unroll 1
      for (int at = threadIdx.x; at < packets; at += kThreads) {
        ptx::st_relaxed_b128(packet(other, 0, at), 0.0f, 0.0f, 0);
      }
    }
  }
};

/// Grid (heads_kv, parts, batch). kPaged: pages of a power of two of keys, at
/// least those of a warp's tile.
template <typename T, int kDim, int kWarps, int kBlocks, DirectForm kForm, bool kPaged, bool kStream>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) decode_direct_kernel(const __grid_constant__ DirectArgs args) {
  constexpr int kKeys = direct_keys(kDim);
  using Tile = DirectTile<T, kDim, kKeys / 16, kForm, kStream>;
  extern __shared__ float4 direct_shared[];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  const int head_kv = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y),
            batch = static_cast<int>(blockIdx.z);
  ptx::grid_dependency_launch();
  if (kStream && batch < args.early) prefetch_tile<kDim, kKeys, kPaged>(args, head_kv, part, batch);
  ptx::grid_dependency_wait();

  // Requests first, in the order in which their answers are needed.
  const int length = args.lengths != nullptr ? __ldcg(args.lengths + batch) : args.capacity;
  const char* k = stepped(args.k, head_kv, args.k_head) + Tile::key_chunk() * 16;
  const char* v = stepped(args.v, head_kv, args.v_head) + lane / 4 * 16;
  int row = batch;
  bool exists = true;  // an entry without a row of the cache sees nothing
  if constexpr (!kPaged) {
    if (args.rows_of != nullptr) {
      row = __ldcg(args.rows_of + batch);
      exists = row >= 0;
      row = max(row, 0);
    }
    k = stepped(k, row, args.k_row);
    v = stepped(v, row, args.v_row);
  }
  const int begin = part * args.first;
  int key = begin + warp * kKeys;
  int page = 0, page_after = 0;  // of the tile that is loaded, and of the next
  const int32_t* const pages = kPaged ? args.pages + batch * args.pages_stride : nullptr;
  const auto page_of = [&](int at) { return pages[min(at >> args.page_shift, args.last_page)]; };  // L1 has the others
  const auto in_page = [&](int at) { return kPaged ? at & ((1 << args.page_shift) - 1) : at; };
  // Where a lane's first chunk of row `r` of the tile at `first` lies. Rows
  // from `end` on may not be read: the last one before it is, and hidden later.
  const auto key_rows = [&](int first, int end) {
    return [&, base = kPaged ? stepped(k, page, args.k_row) : k, first, end](int r) {
      return stepped(base, in_page(min(first + r, end - 1)), args.k_key);
    };
  };
  const auto value_rows = [&](int first, int end) {
    return [&, base = kPaged ? stepped(v, page, args.v_row) : v, first, end](int r) {
      return stepped(base, in_page(min(first + r, end - 1)), args.v_key);
    };
  };
  Tile tile;
  if constexpr (kPaged) {
    page = page_of(key);
    page_after = page_of(key + args.step);
    // Streaming has pushed the table out of L2: it is on its way when the CTAs
    // behind this one ask for it.
    if (kStream && threadIdx.x == 0 && batch + args.next_batch + 1 < static_cast<int>(gridDim.z)) {
      ptx::prefetch_l2(pages + (args.next_batch + 1) * args.pages_stride + min(begin >> args.page_shift, args.last_page));
    }
  } else {
    tile.load_keys(key_rows(key, args.capacity));
    tile.load_values(value_rows(key, args.capacity));
  }
  typename Tile::Queries queries;
#pragma unroll
  for (int p = 0; p < Tile::kSets; ++p) {
    const int r = queries.row(p);
    int query, head;
    args.by_group(r, query, head);
    head += head_kv * static_cast<int>(args.by_group.divisor);
    const char* const q = stepped(stepped(stepped(args.q, batch, args.q_batch), query, args.q_row), head, args.q_head);
    queries.load(p, r < args.rows ? q + queries.chunk(p) * 16 : nullptr);
  }

  const int keys = exists ? max(0, min(length + args.appended, args.capacity)) : 0;
  if (part > 0 && begin >= keys) return;
  const int end = min(keys, begin + args.span);
  bool again = false;  // load the first tile again
  if (args.k_new != nullptr && exists) {
    again = append_keys<kDim, kKeys>(args, head_kv, begin, key, batch, length, [&](int at, int& to, int& within) {
      to = kPaged ? page_of(at) : row;
      within = in_page(at);
    });
    asm volatile("" : "+l"(k), "+l"(v) : : "memory");  // no load from here on before the stores
  }
  if (key < end && (kPaged || again)) {
    tile.load_keys(key_rows(key, end));
    tile.load_values(value_rows(key, end));
  }
  const DirectMerge<T, kDim, kWarps> merge(args, head_kv, part, batch, direct_shared);
  if constexpr (!Tile::kWide) queries.arrange();
  DirectState<T, kDim, Tile> state;
  state.clear();
  typename Tile::Scores s;
#pragma unroll 1
  for (; key + args.step < end; key += args.step) {
    const int next = key + args.step;
    if constexpr (kPaged) page = page_after;
    tile.scores(s, queries, args.scale);
    tile.load_keys(key_rows(next, end));
    if constexpr (kPaged) page_after = page_of(next + args.step);
    state.weigh(s);
    state.add(s, tile);
    tile.load_values(value_rows(next, end));
  }
  if (kStream && args.prefetch_next) prefetch_next<kDim, kKeys, kPaged>(args);
  if (key < end) {
    tile.scores(s, queries, args.scale);
    if (key + kKeys > end) tile.hide(s, end - key);
    state.weigh(s);
    state.add(s, tile);
  }

  const int rows = args.rows;
  state.store(merge.buffer + warp * rows * merge.kPitch, merge.kPitch, merge.stats + warp * rows, rows);
  __syncthreads();
  const bool last = part + 1 == static_cast<int>(gridDim.y) || begin + args.first >= keys;
  merge.merge_warps(last);
  if (last && part > 0) merge.merge_parts();
}

}  // namespace vivace
