// Watches where in the text the speech is, from the attention of a few heads, and stops what has gone wrong.
// The decisions of Chatterbox 0.1.7's multilingual alignment analyzer (resemble-ai/chatterbox,
// models/t3/inference/alignment_stream_analyzer.py), from the heads' probe rows instead of whole attention maps.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace vivace {

/// What to do to the guided logits before the repetition penalty.
enum class AlignmentDecision {
  kNone,
  kSuppressStop,  // logit of the stop token = -2^15: the text is not through
  kForceStop,     // all logits -2^15, the stop token's 2^15: repetition, or a tail that goes on too long
};

class AlignmentAnalyzer {
 public:
  /// text_length: text tokens with start and stop, as they stand in the prompt.
  explicit AlignmentAnalyzer(int64_t text_length) : text_length_(text_length) {}

  /// One step, before its token is sampled. `rows`: (frames, text_length) attention to the text, averaged over the heads:
  /// the two start-of-speech frames at first, one frame later. `last_token`: the latest token (start-of-speech at first).
  AlignmentDecision step(std::span<const float> rows, int64_t last_token);

  /// Index of the text token being spoken.
  int64_t text_position() const { return text_position_; }
  bool complete() const { return complete_; }

 private:
  int64_t text_length_;
  int64_t frames_ = 0;  // rows seen
  int64_t step_ = 0;
  int64_t text_position_ = 0;
  int64_t completed_at_ = -1;  // frames_ when the text was first spoken through
  bool complete_ = false;
  std::vector<double> tail_mass_;     // attention to each of the last three text tokens since completed_at_
  double repeated_mass_ = 0;          // largest attention to earlier text, summed over the frames since completed_at_
  std::vector<int64_t> last_tokens_;  // at most three
};

}  // namespace vivace
