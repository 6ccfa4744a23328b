// Chatterbox's clean-up of a text before it is tokenized.
#pragma once

#include <string>
#include <string_view>

namespace vivace {

enum class PuncNorm {
  kEnglish,       // chatterbox.tts.punc_norm
  kMultilingual,  // chatterbox.mtl_tts.punc_norm: also takes the full-width sentence enders
};

/// The text as Chatterbox 0.1.7 would hand it to its tokenizer: first letter capitalised, runs of white space collapsed,
/// uncommon punctuation replaced, a full stop added where no sentence ender stands.
/// An empty text becomes Chatterbox's own sentence for it. Text: UTF-8; throws Error where it is not.
std::string punc_norm(std::string_view text, PuncNorm variant = PuncNorm::kEnglish);

}  // namespace vivace
