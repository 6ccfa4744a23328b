#include "host/manifest.h"

#include <limits>

#include "host/error.h"
#include "host/json.h"

namespace vivace {
namespace {

// Sizes beyond these are not models but mistakes: they would only show as allocations that fail.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr double kMaxNumber = std::numeric_limits<double>::max();

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string sha256(const JsonValue& value) {
  if (!is_sha256(value.string())) value.fail("64 lower-case hexadecimal digits");
  return value.string();
}

/// A version number that this host knows up to `newest`.
int64_t version(const JsonValue& value, int64_t newest, const std::string& file, const std::string& producer) {
  const int64_t number = value.integer(1, INT64_MAX);
  if (number > newest) {
    throw FileError(file, "made by a newer vivace (" + printable(producer) + "): manifest." + value.path() + " is " +
                              std::to_string(number) + ", this one reads up to " + std::to_string(newest));
  }
  return number;
}

Manifest::Source parse_source(const JsonValue& value) {
  Manifest::Source source;
  if (value.has("random_seed")) {
    source.random_seed = value["random_seed"].integer(INT64_MIN, INT64_MAX);
    return source;
  }
  source.name = value["name"].string();
  source.sha256 = sha256(value["sha256"]);
  return source;
}

Manifest::Model parse_model(const JsonValue& value) {
  Manifest::Model model{};
  model.hidden_size = value["hidden_size"].integer(1, kMaxSize);
  model.intermediate_size = value["intermediate_size"].integer(1, kMaxSize);
  model.num_layers = value["num_layers"].integer(1, kMaxLayers);
  model.num_heads = value["num_heads"].integer(1, kMaxSize);
  model.num_kv_heads = value["num_kv_heads"].integer(1, model.num_heads);
  if (model.num_heads % model.num_kv_heads != 0) {
    value["num_kv_heads"].fail("a divisor of num_heads " + std::to_string(model.num_heads));
  }
  model.head_dim = value["head_dim"].integer(1, kMaxSize);
  model.rms_norm_eps = value["rms_norm_eps"].number(0, 1);
  model.rope_theta = value["rope_theta"].number(std::numeric_limits<double>::min(), kMaxNumber);
  if (value.has("rope_scaling")) value["rope_scaling"].object();  // already in the module's tables
  model.max_positions = value["max_positions"].integer(1, INT64_MAX);
  model.parameters = value["parameters"].integer(1, INT64_MAX);
  return model;
}

Manifest::Text parse_text(const JsonValue& value) {
  Manifest::Text text{};
  text.vocab_size = value["vocab_size"].integer(1, kMaxSize);
  text.start_token = value["start_token"].integer(0, text.vocab_size - 1);
  text.stop_token = value["stop_token"].integer(0, text.vocab_size - 1);
  text.max_tokens = value["max_tokens"].integer(1, kMaxSize);
  return text;
}

Manifest::Speech parse_speech(const JsonValue& value) {
  Manifest::Speech speech{};
  speech.vocab_size = value["vocab_size"].integer(1, kMaxSize);
  speech.start_token = value["start_token"].integer(0, speech.vocab_size - 1);
  speech.stop_token = value["stop_token"].integer(0, speech.vocab_size - 1);
  speech.first_invalid_token = value["first_invalid_token"].integer(1, speech.vocab_size);
  speech.max_tokens = value["max_tokens"].integer(1, kMaxSize);
  return speech;
}

Manifest::Conditioning parse_conditioning(const JsonValue& value) {
  Manifest::Conditioning conditioning{};
  conditioning.speaker_embed_size = value["speaker_embed_size"].integer(1, kMaxSize);
  conditioning.prompt_tokens = value["prompt_tokens"].integer(0, kMaxSize);
  conditioning.length = value["length"].integer(1, kMaxSize);
  conditioning.emotion = value["emotion"].boolean();
  return conditioning;
}

std::vector<Manifest::AlignmentHead> parse_alignment_heads(const JsonValue& value, const Manifest::Model& model) {
  std::vector<Manifest::AlignmentHead> heads;
  for (size_t i = 0, count = value.array(); i < count; ++i) {
    const JsonValue pair = value.at(i);
    if (pair.array() != 2) pair.fail("a pair [layer, head]");
    heads.push_back({pair.at(0).integer(0, model.num_layers - 1), pair.at(1).integer(0, model.num_heads - 1)});
  }
  return heads;
}

Manifest::Defaults parse_defaults(const JsonValue& value) {
  Manifest::Defaults defaults{};
  defaults.temperature = value["temperature"].number(0, kMaxNumber);
  defaults.top_p = value["top_p"].number(0, 1);
  defaults.min_p = value["min_p"].number(0, 1);
  defaults.repetition_penalty = value["repetition_penalty"].number(std::numeric_limits<double>::min(), kMaxNumber);
  defaults.cfg_weight = value["cfg_weight"].number(0, kMaxNumber);
  defaults.exaggeration = value["exaggeration"].number(-kMaxNumber, kMaxNumber);
  return defaults;
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& file) {
  const nlohmann::json json = parse_json(text, file, "manifest");
  const JsonValue root(json, file, "manifest");

  Manifest manifest{};
  // First what tells whether the rest can be understood at all.
  manifest.producer = root["producer"].string();
  manifest.format = version(root["format"], kManifestFormat, file, manifest.producer);
  root["kind"].one_of({"t3"});
  manifest.operators = version(root["operators"], kOperatorsVersion, file, manifest.producer);

  manifest.torch = root["torch"].string();
  manifest.dtype = static_cast<Manifest::Dtype>(root["dtype"].one_of({"float32", "float16", "bfloat16"}));
  manifest.variant = static_cast<Manifest::Variant>(root["variant"].one_of({"english", "multilingual"}));
  manifest.source = parse_source(root["source"]);
  manifest.model = parse_model(root["model"]);
  manifest.text = parse_text(root["text"]);
  manifest.speech = parse_speech(root["speech"]);
  manifest.conditioning = parse_conditioning(root["conditioning"]);
  manifest.alignment_heads = parse_alignment_heads(root["alignment_heads"], manifest.model);
  manifest.defaults = parse_defaults(root["defaults"]);
  root["digest"]["algorithm"].one_of({"sha256"});
  manifest.digest = sha256(root["digest"]["records"]);
  manifest.json = text;
  return manifest;
}

std::string_view to_string(Manifest::Dtype dtype) noexcept {
  constexpr std::string_view kNames[] = {"float32", "float16", "bfloat16"};
  return kNames[static_cast<int>(dtype)];
}

std::string_view to_string(Manifest::Variant variant) noexcept {
  return variant == Manifest::Variant::kEnglish ? "english" : "multilingual";
}

}  // namespace vivace
