#include "host/voice.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "host/error.h"
#include "tests/host/catch.h"
#include "tests/host/files.h"
#include "tests/host/manifests.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

struct VoiceFile {
  std::string speaker_dtype = "F32", prompt_dtype = "I64";
  std::vector<float> speaker = std::vector<float>(256, 0.0625f);
  std::vector<int64_t> prompt = std::vector<int64_t>(150, 17);
  std::vector<float> emotion = {0.5f};
  bool with_prompt = true;

  std::string text() const {
    nlohmann::json header;
    std::string data;
    const auto add = [&](const char* name, const std::string& dtype, const std::vector<size_t>& shape, const void* values,
                         size_t bytes) {
      header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes}}};
      data.append(static_cast<const char*>(values), bytes);
    };
    add("t3.speaker_emb", speaker_dtype, {1, speaker.size()}, speaker.data(), 4 * speaker.size());
    if (with_prompt) add("t3.cond_prompt_speech_tokens", prompt_dtype, {1, prompt.size()}, prompt.data(), 8 * prompt.size());
    if (!emotion.empty()) add("t3.emotion_adv", "F32", {1, 1, emotion.size()}, emotion.data(), 4 * emotion.size());
    const float other = 1;
    add("gen.embedding", "F32", {1}, &other, 4);
    const std::string json = header.dump();
    std::string result;
    append<uint64_t>(result, json.size());
    return result + json + data;
  }
};

Voice load(const std::string& text) {
  static const Manifest manifest = parse_manifest(kManifestJson, "t3.vivace");
  return load_voice(Safetensors::parse(bytes_of(text), "voice.safetensors"), manifest);
}

std::string error_for(const VoiceFile& file) {
  const std::string text = file.text();
  return error_of([&] { load(text); });
}

}  // namespace

TEST_CASE("a good voice gives speaker, prompt and emotion") {
  const TempFile file(VoiceFile{}.text());
  const Voice voice = load_voice(file.path(), parse_manifest(kManifestJson, "t3.vivace"));
  CHECK(voice.speaker_emb == std::vector<float>(256, 0.0625f));
  CHECK(voice.prompt_tokens == std::vector<int64_t>(150, 17));
  CHECK(voice.emotion == 0.5f);
}

TEST_CASE("a voice may be shorter than the longest prompt and lack the emotion") {
  VoiceFile file;
  file.prompt = {6560};
  file.emotion = {};
  const std::string text = file.text();
  CHECK(load(text).prompt_tokens == std::vector<int64_t>{6560});
  CHECK_FALSE(load(text).emotion);
}

TEST_CASE("a voice that does not fit the model is refused by tensor, shape and dtype") {
  VoiceFile file;
  file.speaker.resize(128);
  CHECK(error_for(file) == "voice.safetensors: t3.speaker_emb is F32 [1, 128], expected F32 [1, 256]");
  file = {};
  file.speaker_dtype = "I32";
  CHECK_THAT(error_for(file), ContainsSubstring("t3.speaker_emb is I32 [1, 256]"));
  file = {};
  file.prompt.resize(151);
  CHECK_THAT(error_for(file), ContainsSubstring("t3.cond_prompt_speech_tokens is I64 [1, 151], expected I64 [1, 1..150]"));
  file.prompt.clear();
  CHECK_THAT(error_for(file), ContainsSubstring("is I64 [1, 0]"));
  file = {};
  file.prompt_dtype = "F64";
  CHECK_THAT(error_for(file), ContainsSubstring("is F64 [1, 150]"));
  file = {};
  file.with_prompt = false;
  CHECK_THAT(error_for(file), ContainsSubstring("no tensor \"t3.cond_prompt_speech_tokens\"; it has \"gen.embedding\""));
  file = {};
  file.emotion = {0.5f, 0.5f};
  CHECK_THAT(error_for(file), ContainsSubstring("t3.emotion_adv is F32 [1, 1, 2], expected F32 of one element"));
}

TEST_CASE("numbers that would poison the model are refused where they stand") {
  VoiceFile file;
  file.speaker[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THAT(error_for(file), ContainsSubstring("t3.speaker_emb is nan at 3, expected finite numbers"));
  file = {};
  file.emotion = {std::numeric_limits<float>::infinity()};
  CHECK_THAT(error_for(file), ContainsSubstring("t3.emotion_adv is inf at 0"));
  file = {};
  file.prompt[149] = 8194;
  CHECK_THAT(error_for(file),
             ContainsSubstring("t3.cond_prompt_speech_tokens is 8194 at 149, expected tokens from 0 to 8193"));
  file.prompt[149] = -1;
  CHECK_THAT(error_for(file), ContainsSubstring("is -1 at 149"));
}

TEST_CASE("mutated voices never crash") {
  VoiceFile small;
  small.prompt = {1, 2, 3};
  const std::string good = small.text();
  std::mt19937 random(3);
  int refusals = 0;
  for (int round = 0; round < 3000; ++round) {
    const std::string text = mutate(good, random);
    refusals += refused([&] { load(text); });
  }
  CHECK(refusals > 500);
}
