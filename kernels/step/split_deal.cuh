// Which warpgroup attends which units. The thread that loads its keys and values finds out, and tells its warps. It does so
// without divisions: what it takes for a stage is time in which less is under way.
#pragma once

#include "kernels/step/split_parts.cuh"

namespace vivace::split {

/// Deals a warpgroup its units, in the order of slots: most there and back among all warpgroups, the last ones to who asks
/// first, so that they end together, whatever memory gives to each.
template <typename S>
class Dealer {
 public:
  __device__ __forceinline__ Dealer(const AttentionCta<S>& c, int group)
      : c_(c),
        slots_(S::parts * static_cast<int>(c.args.p.layers)),
        workers_(c.workers()),
        worker_(c.worker(group)),
        slot_(worker_ < 0 ? slots_ : 0) {
    begin();
  }
  __device__ __forceinline__ int slots() const { return slots_; }
  __device__ __forceinline__ int part() const { return part_; }
  /// Asks for what next() will return, so that it need not wait.
  __device__ __forceinline__ void ask() {
    if (asked_ || turn_ < dealt_ || slot_ == slots_) return;
    answer_ = add_and_get(c_.asked(slot_));
    asked_ = true;
  }
  __device__ __forceinline__ Unit next() {
    for (; slot_ < slots_; ++slot_, part_ = part_ + 1 == S::parts ? 0 : part_ + 1, begin()) {
      int unit = turn_ * workers_ + (turn_ % 2 ? workers_ - 1 - worker_ : worker_);
      if (turn_ >= dealt_) {
        ask();
        asked_ = false;
        unit = dealt_ * workers_ + static_cast<int>(answer_);
      }
      ++turn_;
      if (unit >= units_) continue;
      int group = 0;
      for (; unit >= each_; unit -= each_) ++group;
      return {slot_, unit / S::group, group * S::group + unit % S::group, group};
    }
    return {slots_, 0, 0, 0};
  }

 private:
  static constexpr int kAsked = 2;  // rounds, and what is less than one

  __device__ __forceinline__ void begin() {
    units_ = c_.units_of(part_);
    each_ = units_ / S::head_groups;
    turn_ = 0;
    const int rounds = units_ / workers_;
    dealt_ = rounds == 0 ? 1 << 30 : max(1, rounds - kAsked);
  }

  const AttentionCta<S>& c_;
  int slots_, workers_, worker_, slot_, part_ = 0;
  // Of the slot: units, those of a group of heads, this warpgroup's so far, and how many of them it need not ask for.
  int units_ = 0, each_ = 0, turn_ = 0, dealt_ = 0;
  uint32_t answer_ = 0;
  bool asked_ = false;
};

}  // namespace vivace::split
