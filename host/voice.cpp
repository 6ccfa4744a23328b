#include "host/voice.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "host/error.h"

namespace vivace {
namespace {

constexpr char kSpeaker[] = "t3.speaker_emb";
constexpr char kPrompt[] = "t3.cond_prompt_speech_tokens";
constexpr char kEmotion[] = "t3.emotion_adv";

[[noreturn]] void fail(const Safetensors& file, const char* name, const std::string& came, const std::string& expected) {
  throw FileError(file.path(), std::string(name) + " is " + came + ", expected " + expected);
}

/// The elements, copied out because nothing aligns them inside the file.
template <typename T>
std::vector<T> elements(const SafetensorsView& view) {
  std::vector<T> values(view.data.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), view.data.data(), view.data.size());
  return values;
}

void check_finite(const Safetensors& file, const char* name, const std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      fail(file, name, std::to_string(values[i]) + " at " + std::to_string(i), "finite numbers");
    }
  }
}

}  // namespace

Voice load_voice(const std::string& path, const Manifest& manifest) { return load_voice(Safetensors::open(path), manifest); }

Voice load_voice(const Safetensors& file, const Manifest& manifest) {
  const Manifest::Conditioning& conditioning = manifest.conditioning;
  Voice voice;

  const SafetensorsView& speaker = file.at(kSpeaker);
  if (speaker.dtype != "F32" || speaker.shape != std::vector<int64_t>{1, conditioning.speaker_embed_size}) {
    fail(file, kSpeaker, describe(speaker), "F32 [1, " + std::to_string(conditioning.speaker_embed_size) + "]");
  }
  voice.speaker_emb = elements<float>(speaker);
  check_finite(file, kSpeaker, voice.speaker_emb);

  const SafetensorsView& prompt = file.at(kPrompt);
  const bool is_row = prompt.dtype == "I64" && prompt.shape.size() == 2 && prompt.shape[0] == 1;
  if (!is_row || prompt.shape[1] < 1 || prompt.shape[1] > conditioning.prompt_tokens) {
    fail(file, kPrompt, describe(prompt), "I64 [1, 1.." + std::to_string(conditioning.prompt_tokens) + "]");
  }
  voice.prompt_tokens = elements<int64_t>(prompt);
  for (size_t i = 0; i < voice.prompt_tokens.size(); ++i) {
    const int64_t token = voice.prompt_tokens[i];
    if (token < 0 || token >= manifest.speech.vocab_size) {
      fail(file, kPrompt, std::to_string(token) + " at " + std::to_string(i),
           "tokens from 0 to " + std::to_string(manifest.speech.vocab_size - 1));
    }
  }

  if (const SafetensorsView* emotion = file.find(kEmotion)) {
    if (emotion->dtype != "F32" || emotion->numel() != 1) fail(file, kEmotion, describe(*emotion), "F32 of one element");
    const std::vector<float> values = elements<float>(*emotion);
    check_finite(file, kEmotion, values);
    voice.emotion = values[0];
  }
  return voice;
}

Voice make_voice(std::vector<float> speaker_emb, std::vector<int64_t> prompt_tokens, const Manifest& manifest) {
  const char* op = "make_voice";
  const int64_t width = manifest.conditioning.speaker_embed_size;
  check(static_cast<int64_t>(speaker_emb.size()) == width, op, "speaker_emb has ", speaker_emb.size(),
        " numbers, the model expects ", width);
  for (size_t i = 0; i < speaker_emb.size(); ++i) {
    check(std::isfinite(speaker_emb[i]), op, "speaker_emb[", i, "] is ", speaker_emb[i], ", expected a finite number");
  }
  check(!prompt_tokens.empty() && static_cast<int64_t>(prompt_tokens.size()) <= manifest.speech.max_tokens, op,
        "prompt_tokens has ", prompt_tokens.size(), " tokens, expected 1 to ", manifest.speech.max_tokens);
  for (size_t i = 0; i < prompt_tokens.size(); ++i) {
    check(prompt_tokens[i] >= 0 && prompt_tokens[i] < manifest.speech.vocab_size, op, "prompt_tokens[", i, "] is ",
          prompt_tokens[i], ", expected 0 to ", manifest.speech.vocab_size - 1);
  }
  return {std::move(speaker_emb), std::move(prompt_tokens), std::nullopt};
}

}  // namespace vivace
