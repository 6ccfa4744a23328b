// The fifth warp of a warpgroup that attends: it fetches what a unit begins with, and sends what it ends with, so that the
// four others go from unit to unit.
#pragma once

#include "kernels/step/split_parts.cuh"

namespace vivace::split {

template <typename T, typename S>
class Courier {
 public:
  __device__ __forceinline__ Courier(const AttentionCta<S>& c, int group, int lane)
      : c_(c), group_(group), lane_(lane), workers_(c.workers()), worker_(c.worker(group)) {}

  /// All units of the warpgroup. The next one's q is there before a unit ends, but at the end of a slot perhaps: then it may
  /// depend on what this one sends.
  __device__ __forceinline__ void run() {
    const int slots = S::parts * static_cast<int>(c_.args.p.layers);
    Position queue;
    Unit unit = c_.take(group_, queue);
    for (signal_to(unit.slot, 0); unit.slot < slots; ++turn_) {
      if (!fetched_) fetch(unit, true);
      fetched_ = false;
      const Unit next = c_.take(group_, queue);
      if (next.slot < slots) fetch(next, next.slot == unit.slot);
      end(unit);
      signal_to(next.slot, next.slot == unit.slot ? next.group : 0);
      unit = next;
    }
  }

 private:
  /// q, k and v of a unit, the first not fetched yet; arms their words again, for the layer after next.
  __device__ __forceinline__ void fetch(const Unit& unit, bool wait) {
    const int part = unit.slot % S::parts, row = c_.shared.rows[part][unit.place].row;
    const int vector = min(lane_, 23);  // of 24
    uint4* from = reinterpret_cast<uint4*>(c_.fresh(unit.slot / S::parts, part, row, unit.head)) + vector;
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
  __device__ __forceinline__ void end(const Unit& unit) {
    barrier_wait(&c_.shared.end[group_][turn_ % 2], turn_ / 2 % 2);
    const step::SoftmaxOutput o(c_.shared.merged[group_][turn_ % 2], lane_);
    const int part = unit.slot % S::parts, row = c_.shared.rows[part][unit.place].row;
    T* to = c_.template at<T>(part, AttentionCta<S>::L::attention) + row * S::hidden + unit.head * 64;
    store_kept(reinterpret_cast<uint32_t*>(to) + lane_, pack2<T>(o.lo, o.hi));
  }

  /// Counts the groups of heads that this warpgroup has ended: those of slots before this one, and in it those before
  /// `heads`. Of a slot none before its first q, which says that all have counted those of the layer before: only sums are
  /// waited for.
  __device__ __forceinline__ void signal_to(int slot, int heads) {
    for (; slot_ < slot || heads_ < heads; heads_ = (heads_ + 1) % S::head_groups) {
      signal(slot_ % S::parts, heads_);
      if (heads_ + 1 == S::head_groups) ++slot_;
    }
  }
  /// The first warpgroup counts for those without a unit, too: all launches count the same.
  __device__ __forceinline__ void signal(int part, int heads) const {
    __syncwarp();
    const int units = c_.units_of(part), idle = c_.args.signals - min(workers_, units);
    const int n = (worker_ == 0 ? idle : 0) + (worker_ >= 0 && worker_ < units ? 1 : 0);
    if (lane_ == 0 && n > 0) add_release(c_.counter(Counters::attended + 4 * part + heads), n);
  }

  const AttentionCta<S>& c_;
  int group_, lane_, workers_, worker_;
  int slot_ = 0, heads_ = 0;  // the first group of heads that has not been counted
  int turn_ = 0, begun_ = 0;  // units before this one, and those that have begun
  bool fetched_ = false;      // the next one has
};

}  // namespace vivace::split
