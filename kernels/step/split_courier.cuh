// The fifth warp of a warpgroup that attends: it fetches what a unit begins with, and sends what it ends with, so that the
// four others go from unit to unit.
#pragma once

#include "kernels/step/split_parts.cuh"

namespace vivace::split {

template <typename T, typename S>
class Courier {
 public:
  __device__ __forceinline__ Courier(const AttentionCta<S>& c, int group, int lane) : c_(c), group_(group), lane_(lane) {}

  /// All units of the warpgroup. The next one's q is there before a unit ends, but at the end of a slot perhaps: then it may
  /// depend on what this one sends.
  __device__ __forceinline__ void run() {
    const int slots = S::parts * static_cast<int>(c_.args.p.layers);
    for (int slot = 0; slot < slots; ++slot) {
      const auto units = c_.units(slot / S::parts, slot % S::parts, group_);
      int group = 0;  // of heads, the first that has not ended here
      for (int u = 0; u < units.count; ++u, ++turn_) {
        if (!fetched_) fetch(units, slot, u, true);
        fetched_ = false;
        if (u + 1 < units.count) {
          fetch(units, slot, u + 1, true);
        } else if (slot + 1 < slots) {
          const auto next = c_.units((slot + 1) / S::parts, (slot + 1) % S::parts, group_);
          if (next.count > 0) fetch(next, slot + 1, 0, false);
        }
        send(units, slot, u);
        const int next = u + 1 < units.count ? units.group_of(units[u + 1]) : S::head_groups;
        for (; group < next; ++group) signal(units, slot, group);
      }
      for (; group < S::head_groups; ++group) signal(units, slot, group);
    }
  }

 private:
  using Units = typename AttentionCta<S>::Units;

  /// q, k and v of a unit, the first not fetched yet; arms their words again, for the layer after next.
  __device__ __forceinline__ void fetch(const Units& units, int slot, int u, bool wait) {
    const Row& row = c_.shared.rows[slot % S::parts][units.row_of(units[u])];
    const int vector = min(lane_, 23);  // of 24
    uint4* from =
        reinterpret_cast<uint4*>(c_.fresh(slot / S::parts, slot % S::parts, row.row, units.head_of(units[u]))) + vector;
    uint4 x;
    step::Watchdog<kMaxTurns> watchdog;
    do {
      x = load_relaxed(from);
      fetched_ = all_lanes(x.x != 0 && x.y != 0 && x.z != 0 && x.w != 0);
      watchdog.check();
    } while (wait && !fetched_);
    if (!fetched_) return;
    const int set = begun_ % 2;
    if (lane_ < 24) {
      c_.shared.fresh[group_][set][vector] = make_uint4(~x.x, ~x.y, ~x.z, ~x.w);
      store_relaxed(from, make_uint4(0, 0, 0, 0));
    }
    sm90::barrier_arrive(&c_.shared.begin[group_][set]);
    ++begun_;
  }

  /// What a unit comes to, when its warps have ended.
  __device__ __forceinline__ void send(const Units& units, int slot, int u) {
    barrier_wait(&c_.shared.end[group_][turn_ % 2], turn_ / 2 % 2);
    const step::SoftmaxOutput o(c_.shared.merged[group_][turn_ % 2], lane_);
    const Row& row = c_.shared.rows[slot % S::parts][units.row_of(units[u])];
    T* to = c_.template at<T>(slot % S::parts, AttentionCta<S>::L::attention) + row.row * S::hidden +
            units.head_of(units[u]) * 64;
    reinterpret_cast<uint32_t*>(to)[lane_] = pack2<T>(o.lo, o.hi);
  }

  /// Counts a group of heads in a slot; the first warpgroup for those without a unit, too: all launches count the same.
  __device__ __forceinline__ void signal(const Units& units, int slot, int group) const {
    __syncwarp();
    const int idle = c_.args.signals - min(units.workers, units.total);
    const int n = (units.place == 0 ? idle : 0) + min(1, units.count);
    if (lane_ == 0 && n > 0) add_release(c_.counter(Counters::attended + 4 * (slot % S::parts) + group), n);
  }

  const AttentionCta<S>& c_;
  int group_, lane_;
  int turn_ = 0, begun_ = 0;  // units before this one, and those that have begun
  bool fetched_ = false;      // the next one has
};

}  // namespace vivace::split
