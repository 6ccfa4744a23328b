// What prompts of a voice have in common is computed once (host/voice_cache.h).
#include <memory>

#include "tests/host/catch.h"
#include "tests/host/engine_fixture.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

std::vector<Request> requests_of(const EngineFixture& fixture, const std::shared_ptr<const Voice>& voice) {
  std::vector<Request> requests;
  for (const size_t text : {9, 4, 20, 20, 5, 14}) {
    Request request = fixture.request(voice, 12, text);
    request.sampling.seed = static_cast<int64_t>(7 + text);
    request.sampling.cfg_weight = text == 5 ? 0.0f : 0.5f;
    requests.push_back(request);
  }
  return requests;
}

}  // namespace

TEST_CASE("a voice that is known gives the tokens of one that is not, from less work", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const int64_t voice_length = engine.manifest().conditioning.length;
  int64_t known = 0, reused = 0, prompts = 0;  // positions of an unconditional row
  for (const Request& request : requests_of(fixture, fixture.voice(engine))) {
    INFO("text of " << request.text_tokens.size());
    Engine fresh(fixture.options());
    Request alone = request;
    alone.voice = fixture.voice(fresh);
    const Result expected = fresh.wait(fresh.submit(alone));
    CHECK(fresh.stats().prompt_tokens_reused == 0);
    CHECK(engine.wait(engine.submit(request)).tokens == expected.tokens);

    const bool guided = request.sampling.cfg_weight > 0;
    const int64_t length = expected.prompt_tokens;
    if (known > 0) reused += voice_length + (guided ? std::min(known, length - 2) : 0);
    prompts += (guided ? 2 : 1) * length;
    CHECK(engine.stats().prompt_tokens_reused == reused);
    CHECK(engine.stats().prompt_tokens == prompts);
    known = std::max(known, guided ? length - 2 : voice_length);
  }
  CHECK(reused > 0);
}

TEST_CASE("requests of a known voice give the same tokens together", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.max_requests = 6;
  Engine engine(options);
  const std::vector<Request> requests = requests_of(fixture, fixture.voice(engine));
  std::vector<std::vector<int64_t>> expected;
  for (const Request& request : requests) expected.push_back(engine.wait(engine.submit(request)).tokens);
  std::vector<uint64_t> ids;
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  for (size_t i = 0; i < ids.size(); ++i) CHECK(engine.wait(ids[i]).tokens == expected[i]);
}

TEST_CASE("other voices and exaggerations share nothing, however many there are", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  std::vector<Request> requests;
  for (int i = 0; i < 6; ++i) {
    Request request = fixture.request(fixture.voice(engine), 8, 8);
    request.exaggeration = 0.3f + 0.1f * static_cast<float>(i);
    requests.push_back(request);
  }
  requests.push_back(requests[0]);
  requests.back().voice = requests[1].voice;
  std::vector<std::vector<int64_t>> first;
  for (const Request& request : requests) first.push_back(engine.wait(engine.submit(request)).tokens);
  CHECK(engine.stats().prompt_tokens_reused == 0);
  for (size_t i = 0; i < requests.size(); ++i) CHECK(engine.wait(engine.submit(requests[i])).tokens == first[i]);
  CHECK(engine.wait(engine.submit(requests.back())).tokens == first.back());
  CHECK(engine.stats().prompt_tokens_reused > 0);
}

TEST_CASE("a deterministic engine computes every prompt as a whole", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.deterministic = true;
  Engine engine(options);
  const Request request = fixture.request(fixture.voice(engine), 5, 8);
  const auto tokens = engine.wait(engine.submit(request)).tokens;
  CHECK(engine.wait(engine.submit(request)).tokens == tokens);
  CHECK(engine.stats().prompt_tokens_reused == 0);
}
