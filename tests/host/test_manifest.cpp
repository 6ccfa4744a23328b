#include "host/manifest.h"

#include <nlohmann/json.hpp>
#include <string>

#include "host/error.h"
#include "tests/host/catch.h"
#include "tests/host/files.h"
#include "tests/host/manifests.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

/// The error for the good manifest with the value at a JSON pointer replaced, or removed when `value` is "".
std::string error_with(const std::string& pointer, const std::string& value) {
  auto json = nlohmann::json::parse(kManifestJson);
  nlohmann::json operation = {{"op", value.empty() ? "remove" : "replace"}, {"path", pointer}};
  if (!value.empty()) operation["value"] = nlohmann::json::parse(value);
  json = json.patch(nlohmann::json::array({operation}));
  return error_of([&] { parse_manifest(json.dump(), "t3.vivace"); });
}

}  // namespace

TEST_CASE("a good manifest gives every field") {
  const Manifest manifest = parse_manifest(kManifestJson, "t3.vivace");
  CHECK(manifest.format == 1);
  CHECK(manifest.producer == "vivace 0.1.0");
  CHECK(to_string(manifest.dtype) == "bfloat16");
  CHECK(to_string(manifest.variant) == "english");
  CHECK(manifest.source.name == "t3_cfg.safetensors");
  CHECK_FALSE(manifest.source.random_seed);
  CHECK(manifest.model.num_layers == 30);
  CHECK(manifest.model.rope_theta == 500000.0);
  CHECK(manifest.model.parameters == 532405248);
  CHECK(manifest.text.start_token == 255);
  CHECK(manifest.speech.stop_token == 6562);
  CHECK(manifest.conditioning.length == 34);
  REQUIRE(manifest.alignment_heads.size() == 3);
  CHECK(manifest.alignment_heads[2].layer == 9);
  CHECK(manifest.defaults.min_p == 0.05);
  CHECK(manifest.digest == std::string(64, 'f'));
  CHECK(manifest.json == kManifestJson);
}

TEST_CASE("random weights are told by their seed, and no scaling of RoPE is null") {
  auto json = nlohmann::json::parse(kManifestJson);
  json["source"] = {{"random_seed", 7}};
  json["model"]["rope_scaling"] = nullptr;
  CHECK(parse_manifest(json.dump(), "t3.vivace").source.random_seed == 7);
}

TEST_CASE("a field that a later vivace added is passed over") {
  auto json = nlohmann::json::parse(kManifestJson);
  json["model"]["something_new"] = {1, 2};
  CHECK_NOTHROW(parse_manifest(json.dump(), "t3.vivace"));
}

TEST_CASE("a newer format or operator schema is said to come from a newer vivace") {
  CHECK_THAT(error_with("/format", "2"),
             ContainsSubstring("made by a newer vivace (\"vivace 0.1.0\"): manifest.format is 2"));
  CHECK_THAT(error_with("/operators", "9"), ContainsSubstring("manifest.operators is 9, this one reads up to 1"));
}

TEST_CASE("every field is needed") {
  const auto fields = nlohmann::json::parse(kManifestJson).flatten();
  for (const auto& [pointer, value] : fields.items()) {
    if (pointer == "/model/rope_scaling/factor" || pointer.starts_with("/alignment_heads/")) continue;
    INFO(pointer);
    CHECK_THAT(error_with(pointer, ""), ContainsSubstring("is missing"));
  }
}

TEST_CASE("a field of the wrong type is named with what came") {
  const auto fields = nlohmann::json::parse(kManifestJson).flatten();
  for (const auto& [pointer, value] : fields.items()) {
    if (pointer == "/model/rope_scaling/factor") continue;
    INFO(pointer);
    CHECK_THAT(error_with(pointer, "{}"), ContainsSubstring("is an object, expected"));
  }
  CHECK(error_with("/model/num_layers", "\"30\"") ==
        "t3.vivace: manifest: model.num_layers is \"30\", expected an integer from 1 to 4096");
  CHECK_THAT(error_with("/model/num_layers", "30.0"), ContainsSubstring("model.num_layers is 30.0"));
}

TEST_CASE("values that no model has are refused") {
  CHECK_THAT(error_with("/kind", "\"s3gen\""), ContainsSubstring("kind is \"s3gen\", expected \"t3\""));
  CHECK_THAT(error_with("/dtype", "\"int8\""), ContainsSubstring("expected \"float32\" or \"float16\" or \"bfloat16\""));
  CHECK_THAT(error_with("/model/num_kv_heads", "3"), ContainsSubstring("a divisor of num_heads 16"));
  CHECK_THAT(error_with("/model/num_layers", "0"), ContainsSubstring("model.num_layers is 0"));
  CHECK_THAT(error_with("/model/hidden_size", "18446744073709551615"), ContainsSubstring("model.hidden_size"));
  CHECK_THAT(error_with("/text/start_token", "704"), ContainsSubstring("text.start_token is 704"));
  CHECK_THAT(error_with("/speech/stop_token", "-1"), ContainsSubstring("speech.stop_token is -1"));
  CHECK_THAT(error_with("/alignment_heads/1", "[30, 0]"), ContainsSubstring("alignment_heads[1][0] is 30"));
  CHECK_THAT(error_with("/alignment_heads/1", "[3]"), ContainsSubstring("expected a pair [layer, head]"));
  CHECK_THAT(error_with("/defaults/top_p", "1.5"), ContainsSubstring("defaults.top_p is 1.5"));
  CHECK_THAT(error_with("/digest/algorithm", "\"md5\""), ContainsSubstring("digest.algorithm"));
  CHECK_THAT(error_with("/digest/records", "\"FFFF\""), ContainsSubstring("64 lower-case hexadecimal digits"));
}

TEST_CASE("a manifest cut at any byte is refused") {
  for (size_t size = 0; size + 1 < kManifestJson.size(); ++size) {
    INFO("cut to " << size << " bytes");
    CHECK(error_of([&] { parse_manifest(kManifestJson.substr(0, size), "t3.vivace"); }) != "");
  }
}

TEST_CASE("mutated manifests never crash") {
  std::mt19937 random(2);
  int refusals = 0;
  for (int round = 0; round < 4000; ++round) {
    const std::string text = mutate(kManifestJson, random);
    refusals += refused([&] { parse_manifest(text, "mutated"); });
  }
  CHECK(refusals > 2000);
}
