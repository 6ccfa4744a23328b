#include "host/alignment.h"

#include <algorithm>

#include "csrc/error.h"

namespace vivace {

AlignmentDecision AlignmentAnalyzer::step(std::span<const float> rows, int64_t last_token) {
  const int64_t s = text_length_;
  const int64_t new_frames = s > 0 ? static_cast<int64_t>(rows.size()) / s : 0;
  check(new_frames > 0 && new_frames * s == static_cast<int64_t>(rows.size()), "alignment", "rows has ", rows.size(),
        " values, expected a multiple of the text's ", s, " tokens");

  // A frame may attend no further into the text than there have been steps: what lies beyond counts as zero.
  const int64_t visible = std::min(step_ + 1, s);
  auto attention = [&](int64_t frame, int64_t token) -> double {
    return token < visible ? rows[static_cast<size_t>(frame * s + token)] : 0.0f;
  };

  int64_t position = 0;  // of the newest frame; the first of equal ones
  for (int64_t token = 1; token < s; ++token) {
    if (attention(new_frames - 1, token) > attention(new_frames - 1, position)) position = token;
  }
  const int64_t jump = position - text_position_;
  if (-4 < jump && jump < 7) text_position_ = position;

  complete_ = complete_ || text_position_ >= s - 3;
  if (completed_at_ < 0 && complete_) {
    completed_at_ = frames_ + new_frames;  // frames up to here are not counted below
    tail_mass_.assign(static_cast<size_t>(std::min<int64_t>(3, s)), 0.0);
  } else if (complete_) {
    for (int64_t frame = 0; frame < new_frames; ++frame) {
      const int64_t tail = static_cast<int64_t>(tail_mass_.size());
      for (int64_t i = 0; i < tail; ++i) tail_mass_[static_cast<size_t>(i)] += attention(frame, s - tail + i);
      double largest = 0;
      for (int64_t token = 0; token < s - 5; ++token) largest = std::max(largest, attention(frame, token));
      repeated_mass_ += largest;
    }
  }
  frames_ += new_frames;
  ++step_;

  const bool long_tail = complete_ && *std::max_element(tail_mass_.begin(), tail_mass_.end()) >= 5;  // 200 ms
  const bool repeated_text = complete_ && repeated_mass_ > 5;

  last_tokens_.push_back(last_token);
  if (last_tokens_.size() > 3) last_tokens_.erase(last_tokens_.begin());
  const bool repeated_token = last_tokens_.size() == 3 && last_tokens_[1] == last_tokens_[2];

  if (long_tail || repeated_text || repeated_token) return AlignmentDecision::kForceStop;
  // The last tokens of a text are punctuation and the stop token, rarely attended to.
  if (position < s - 3 && s > 5) return AlignmentDecision::kSuppressStop;
  return AlignmentDecision::kNone;
}

}  // namespace vivace
