// A voice: what T3 is conditioned on, from a safetensors file written by `vivace voice`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "host/manifest.h"
#include "host/safetensors.h"

namespace vivace {

struct Voice {
  std::vector<float> speaker_emb;      // (speaker_embed_size)
  std::vector<int64_t> prompt_tokens;  // (P), P at least 1
  std::optional<float> emotion;        // the emotion it was made with; requests give their own exaggeration
};

/// Reads "t3.speaker_emb" (1, speaker_embed_size) F32, "t3.cond_prompt_speech_tokens" (1, P) I64 and, where present,
/// "t3.emotion_adv" F32 of one element; other tensors are left alone. Throws FileError naming tensor, shape and dtype that
/// came and what the model of `manifest` expects; also for tokens outside the speech vocabulary and for NaN or Inf.
/// Prompts are at most conditioning.prompt_tokens long.
Voice load_voice(const std::string& path, const Manifest& manifest);
Voice load_voice(const Safetensors& file, const Manifest& manifest);

/// A voice from its parts, with the same checks; a prompt may be as long as the model has speech positions. Throws Error.
Voice make_voice(std::vector<float> speaker_emb, std::vector<int64_t> prompt_tokens, const Manifest& manifest);

}  // namespace vivace
