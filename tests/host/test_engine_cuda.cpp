// The engine on a GPU. Hidden: run with `test_engine "[gpu]"`.
#include <memory>

#include "tests/host/catch.h"
#include "tests/host/engine_fixture.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

std::vector<Request> mixed_requests(const EngineFixture& fixture, std::shared_ptr<const Voice> voice, int count) {
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    Request request = fixture.request(voice, 6 + 9 * i, 4 + 3 * static_cast<size_t>(i));
    request.sampling.seed = 100 + i;
    request.sampling.cfg_weight = i % 3 == 0 ? 0.0f : 0.5f;
    request.sampling.temperature = i % 4 == 0 ? 0.0f : 0.9f;
    requests.push_back(request);
  }
  return requests;
}

std::vector<std::vector<int64_t>> run_together(Engine& engine, const std::vector<Request>& requests) {
  std::vector<uint64_t> ids;
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  std::vector<std::vector<int64_t>> tokens;
  for (const uint64_t id : ids) {
    const Result result = engine.wait(id);
    CHECK(result.error == "");
    tokens.push_back(result.tokens);
  }
  return tokens;
}

EngineOptions on(const EngineFixture& fixture, const std::string& device, bool graphs = true) {
  EngineOptions options = fixture.options();
  options.device = device;
  options.cuda_graphs = graphs;
  return options;
}

}  // namespace

TEST_CASE("greedy tokens on CUDA in fp32 are those of Chatterbox", "[.][gpu]") {
  int models = 0;
  for (const char* variant : {"english", "multilingual"}) {
    if (std::getenv((std::string("VIVACE_TEST_MODEL_") + variant).c_str()) == nullptr) {
      WARN("no " << variant << " model was carried to this machine");
      continue;
    }
    ++models;
    const EngineFixture fixture(variant);
    Engine engine(on(fixture, "cuda"));
    const auto voice = fixture.voice(engine);
    for (const auto& c : fixture.expected["cases"]) {
      if (c["temperature"].get<float>() != 0) continue;
      INFO(variant << ", " << c["name"].get<std::string>());
      Request request = fixture.request(voice, c["max_new_tokens"].get<int64_t>());
      request.sampling.temperature = 0;
      request.sampling.min_p = c["min_p"].get<float>();
      request.sampling.top_p = c["top_p"].get<float>();
      request.sampling.repetition_penalty = c["repetition_penalty"].get<float>();
      request.sampling.cfg_weight = c["cfg_weight"].get<float>();
      request.exaggeration = c["exaggeration"].get<float>();
      CHECK(engine.wait(engine.submit(request)).tokens == c["tokens"].get<std::vector<int64_t>>());
    }
    const Stats stats = engine.stats();
    CHECK(stats.graph_replays > stats.eager_steps);
  }
  REQUIRE(models > 0);
}

TEST_CASE("sampled tokens on CUDA are those of the CPU, alone and in a batch, with graphs and without", "[.][gpu]") {
  const EngineFixture fixture;
  Engine cpu(on(fixture, "cpu"));
  const auto voice = fixture.voice(cpu);
  const std::vector<Request> requests = mixed_requests(fixture, voice, 10);
  const auto expected = run_together(cpu, requests);
  {
    Engine engine(on(fixture, "cuda"));
    for (int round = 0; round < 2; ++round) CHECK(run_together(engine, requests) == expected);
    for (size_t i = 0; i < requests.size(); ++i) {
      INFO("request " << i);
      CHECK(engine.wait(engine.submit(requests[i])).tokens == expected[i]);
    }
    const Stats stats = engine.stats();
    CHECK(stats.graph_captures > 0);
    CHECK(stats.graph_replays + stats.eager_steps == stats.decode_steps);
    CHECK(stats.graph_replays > stats.eager_steps);
    CHECK(stats.prompt_tokens_reused > 0);  // all have one voice
  }
  Engine eager(on(fixture, "cuda", false));
  CHECK(run_together(eager, requests) == expected);
  CHECK(eager.stats().graph_replays == 0);
}

TEST_CASE("requests of both generators share a batch on CUDA", "[.][gpu]") {
  const EngineFixture fixture;
  Engine engine(on(fixture, "cuda"));
  std::vector<Request> requests = mixed_requests(fixture, fixture.voice(engine), 4);
  for (size_t i = 0; i < requests.size(); i += 2) requests[i].sampling.rng = Rng::kTorch;
  std::vector<std::vector<int64_t>> alone;
  for (const Request& request : requests) alone.push_back(engine.wait(engine.submit(request)).tokens);
  CHECK(run_together(engine, requests) == alone);
}

TEST_CASE("an interrupted request leaves the others their tokens on CUDA", "[.][gpu]") {
  const EngineFixture fixture;
  Engine engine(on(fixture, "cuda"));
  std::vector<Request> requests = mixed_requests(fixture, fixture.voice(engine), 4);
  const auto expected = run_together(engine, requests);
  requests[1].on_tokens = [](const Progress& progress) { return progress.tokens < 3; };
  const auto tokens = run_together(engine, requests);
  CHECK(tokens[1].size() <= 3);
  for (const size_t other : {0, 2, 3}) CHECK(tokens[other] == expected[other]);
}

TEST_CASE("fused steps on CUDA in bf16: graphs replay what runs without them, and every step is counted", "[.][gpu]") {
  const EngineFixture fixture;
  EngineOptions options = on(fixture, "cuda");
  options.dtype = "bfloat16";
  options.max_requests = 12;
  Engine engine(options);
  if (!engine.stats().not_fused.empty()) {
    WARN("decode_step does not take the test's model here: " << engine.stats().not_fused);
    return;
  }
  const int64_t captures = engine.stats().graph_captures;  // before the first request
  CHECK(captures > 0);
  const std::vector<Request> requests = mixed_requests(fixture, fixture.voice(engine), 12);
  std::vector<std::vector<int64_t>> together = run_together(engine, requests);
  Stats stats = engine.stats();
  CHECK(stats.fused_steps == stats.decode_steps);
  CHECK(stats.graph_replays == stats.decode_steps);
  CHECK(stats.eager_steps == 0);
  CHECK(stats.graph_captures == captures);
  options.cuda_graphs = false;
  Engine eager(options);
  CHECK(run_together(eager, requests) == together);
  stats = eager.stats();
  CHECK(stats.graph_replays == 0);
  CHECK(stats.fused_steps == stats.decode_steps);
}

TEST_CASE("a deterministic engine on CUDA gives a request its tokens alone and among 63 others", "[.][gpu]") {
  const EngineFixture fixture;
  EngineOptions options = on(fixture, "cuda");
  options.dtype = "bfloat16";
  options.max_requests = 64;
  options.capacity = 256;
  std::unique_ptr<Engine> engine;
  try {
    options.deterministic = true;
    engine = std::make_unique<Engine>(options);
  } catch (const Error& error) {
    WARN("no deterministic engine for the test's model here: " << error.what());
    return;
  }
  const auto voice = fixture.voice(*engine);
  std::vector<Request> requests;
  for (int i = 0; i < 64; ++i) {
    Request request = fixture.request(voice, 20 + i, 4 + static_cast<size_t>(i) % 20);
    request.sampling.seed = 300 + i;
    request.sampling.cfg_weight = i % 5 == 0 ? 0.0f : 0.5f;
    request.ignore_stop = true;
    requests.push_back(request);
  }
  const auto together = run_together(*engine, requests);
  for (const size_t i : {0, 1, 17, 40, 63}) {
    INFO("request " << i);
    CHECK(engine->wait(engine->submit(requests[i])).tokens == together[i]);
  }
  const Stats stats = engine->stats();
  CHECK(stats.fused_steps == stats.decode_steps);
}

TEST_CASE("a request on CUDA whose cache row is full ends there, and its neighbours go on", "[.][gpu]") {
  const EngineFixture fixture;
  for (const char* fused : {"auto", "off"}) {
    INFO("fused_step " << fused);
    EngineOptions options = on(fixture, "cuda");
    options.dtype = "bfloat16";
    options.capacity = 80;
    options.fused_step = fused;
    Engine engine(options);
    const auto voice = fixture.voice(engine);
    Request longest = fixture.request(voice, 400, 5), other = fixture.request(voice, 20, 5);
    longest.ignore_stop = other.ignore_stop = true;
    const Result alone = engine.wait(engine.submit(other));
    const uint64_t a = engine.submit(longest);
    const Result full = engine.wait(a);
    CHECK(full.finish_reason == FinishReason::kLength);
    CHECK(static_cast<int64_t>(full.tokens.size()) == 80 - full.prompt_tokens);
    CHECK(full.detail.find("capacity is 80") != std::string::npos);
    for (int i = 0; i < 4; ++i) CHECK(engine.wait(engine.submit(other)).tokens == alone.tokens);
  }
}
