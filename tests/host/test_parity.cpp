// The tokens of Chatterbox's own T3.inference, from this engine.
#include "tests/host/catch.h"
#include "tests/host/engine_fixture.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

Request request_of(const EngineFixture& fixture, const nlohmann::json& c, std::shared_ptr<const Voice> voice) {
  Request request = fixture.request(std::move(voice), c["max_new_tokens"].get<int64_t>());
  SamplingOptions& s = request.sampling;
  s.temperature = c["temperature"].get<float>();
  s.top_p = c["top_p"].get<float>();
  s.min_p = c["min_p"].get<float>();
  s.repetition_penalty = c["repetition_penalty"].get<float>();
  s.cfg_weight = c["cfg_weight"].get<float>();
  s.seed = c["seed"].get<int64_t>();
  s.rng = Rng::kTorch;
  request.exaggeration = c["exaggeration"].get<float>();
  return request;
}

void check_variant(const std::string& variant) {
  const EngineFixture fixture(variant);
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  REQUIRE(fixture.expected["cases"].size() >= 8);
  for (const auto& c : fixture.expected["cases"]) {
    INFO(variant << ", " << c["name"].get<std::string>());
    const Result result = engine.wait(engine.submit(request_of(fixture, c, voice)));
    CHECK(result.error == "");
    CHECK(result.tokens == c["tokens"].get<std::vector<int64_t>>());
    CHECK(to_string(result.finish_reason) == c["finish_reason"].get<std::string>());
  }
}

}  // namespace

TEST_CASE("English tokens are those of Chatterbox", "[parity]") { check_variant("english"); }

TEST_CASE("multilingual tokens are those of Chatterbox with its alignment analyzer", "[parity]") {
  check_variant("multilingual");
}

TEST_CASE("without the analyzer multilingual tokens differ somewhere", "[parity]") {
  const EngineFixture fixture("multilingual");
  Engine engine(fixture.options());
  REQUIRE_FALSE(engine.manifest().alignment_heads.empty());
  const auto voice = fixture.voice(engine);
  int different = 0;
  for (const auto& c : fixture.expected["cases"]) {
    Request request = request_of(fixture, c, voice);
    request.alignment = false;
    different += engine.wait(engine.submit(request)).tokens != c["tokens"].get<std::vector<int64_t>>();
  }
  CHECK(different > 0);
}

TEST_CASE("all cases in one batch give the tokens that they give alone", "[parity]") {
  for (const char* variant : {"english", "multilingual"}) {
    const EngineFixture fixture(variant);
    EngineOptions options = fixture.options();
    options.max_requests = 6;  // fewer than cases: some join while others generate
    Engine engine(options);
    const auto voice = fixture.voice(engine);
    std::vector<uint64_t> ids;
    for (const auto& c : fixture.expected["cases"]) ids.push_back(engine.submit(request_of(fixture, c, voice)));
    for (size_t i = 0; i < ids.size(); ++i) {
      const auto& c = fixture.expected["cases"][i];
      INFO(variant << ", " << c["name"].get<std::string>());
      CHECK(engine.wait(ids[i]).tokens == c["tokens"].get<std::vector<int64_t>>());
    }
  }
}

TEST_CASE("greedy tokens are the same under both generators", "[parity]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  for (const auto& c : fixture.expected["cases"]) {
    if (c["temperature"].get<float>() != 0) continue;
    Request request = request_of(fixture, c, voice);
    request.sampling.rng = Rng::kPhilox;
    CHECK(engine.wait(engine.submit(request)).tokens == c["tokens"].get<std::vector<int64_t>>());
  }
}
