#include "host/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <future>
#include <iterator>
#include <set>
#include <thread>

#include "host/archive.h"
#include "tests/host/catch.h"
#include "tests/host/engine_fixture.h"
#include "tests/host/files.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

/// A request that draws nearly evenly from the whole vocabulary, so that at these seeds it does not meet the stop token.
Request endless(const EngineFixture& fixture, std::shared_ptr<const Voice> voice, int64_t max_new_tokens = 400) {
  Request request = fixture.request(std::move(voice), max_new_tokens, 5);
  request.sampling.temperature = 100;
  request.sampling.min_p = 0;
  request.sampling.cfg_weight = 0;
  return request;
}

/// Waits for a promise, but not for ever.
void arrive(std::promise<void>& promise) {
  REQUIRE(promise.get_future().wait_for(std::chrono::seconds(30)) == std::future_status::ready);
}

}  // namespace

TEST_CASE("a request alone and in a batch gives the same tokens", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  std::vector<Request> requests;
  for (int i = 0; i < 10; ++i) {  // more than fit: they join and leave at different steps
    Request request = fixture.request(voice, 5 + 7 * i, 4 + 3 * static_cast<size_t>(i));
    request.sampling.seed = 100 + i;
    request.sampling.cfg_weight = i % 3 == 0 ? 0.0f : 0.5f;
    request.sampling.temperature = i % 4 == 0 ? 0.0f : 0.9f;
    request.exaggeration = i % 2 == 0 ? 0.5f : 0.9f;
    requests.push_back(request);
  }
  std::vector<std::vector<int64_t>> alone;
  for (const Request& request : requests) alone.push_back(engine.wait(engine.submit(request)).tokens);
  std::vector<uint64_t> ids;
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  for (size_t i = 0; i < ids.size(); ++i) {
    INFO("request " << i);
    CHECK(engine.wait(ids[i]).tokens == alone[i]);
  }
  CHECK(std::set<std::vector<int64_t>>(alone.begin(), alone.end()).size() > 5);
  const Stats stats = engine.stats();
  CHECK(stats.finished == 20);
  CHECK(stats.running == 0);
  CHECK(stats.queued == 0);
  CHECK(stats.decode_rows > stats.decode_steps);
}

TEST_CASE("another seed gives other tokens, the same seed the same", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  Request request = fixture.request(fixture.voice(engine), 20);
  const auto first = engine.wait(engine.submit(request)).tokens;
  CHECK(engine.wait(engine.submit(request)).tokens == first);
  request.sampling.seed = 1;
  CHECK(engine.wait(engine.submit(request)).tokens != first);
}

TEST_CASE("the callback sees every token once, in order", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  Request request = fixture.request(fixture.voice(engine), 25);
  std::vector<int64_t> streamed;
  bool counted = true;
  request.on_tokens = [&](const Progress& progress) {
    streamed.insert(streamed.end(), progress.new_tokens.begin(), progress.new_tokens.end());
    counted = counted && progress.tokens == static_cast<int64_t>(streamed.size()) && progress.max_new_tokens == 25;
    return true;
  };
  const Result result = engine.wait(engine.submit(request));
  CHECK(result.tokens == streamed);
  CHECK(counted);
  CHECK(result.time_to_first_token > 0);
  CHECK(result.seconds >= result.time_to_first_token);
}

TEST_CASE("a callback that returns false ends its request alone", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  Request stopped = endless(fixture, voice), other = endless(fixture, voice, 12);
  stopped.on_tokens = [](const Progress& progress) { return progress.tokens < 7; };
  const uint64_t a = engine.submit(stopped), b = engine.submit(other);
  const Result result = engine.wait(a);
  CHECK(result.finish_reason == FinishReason::kCancelled);
  CHECK(result.tokens.size() == 7);
  CHECK(engine.wait(b).finish_reason == FinishReason::kLength);
}

TEST_CASE("a callback that throws fails its request and no other", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  Request bad = endless(fixture, voice);
  bad.on_tokens = [](const Progress&) -> bool { throw std::runtime_error("no room on the disk"); };
  const uint64_t a = engine.submit(bad), b = engine.submit(endless(fixture, voice, 6));
  const Result result = engine.wait(a);
  CHECK(result.finish_reason == FinishReason::kError);
  CHECK_THAT(result.error, ContainsSubstring("no room on the disk"));
  CHECK(engine.wait(b).tokens.size() == 6);
}

TEST_CASE("cancel ends a running request with what it has, and a waiting one with nothing", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.max_requests = 1;
  Engine engine(options);
  const auto voice = fixture.voice(engine);
  std::promise<void> started;
  Request running = endless(fixture, voice);
  running.on_tokens = [&](const Progress& progress) {
    if (progress.tokens == 3) started.set_value();
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return true;
  };
  const uint64_t a = engine.submit(running), b = engine.submit(endless(fixture, voice));
  arrive(started);
  CHECK(engine.poll(a).status == Status::kRunning);
  CHECK(engine.poll(b).status == Status::kQueued);
  CHECK(engine.cancel(b));
  CHECK(engine.cancel(a));
  const Result first = engine.wait(a), second = engine.wait(b);
  CHECK(first.finish_reason == FinishReason::kCancelled);
  CHECK(first.tokens.size() >= 3);
  CHECK(first.tokens.size() < 400);
  CHECK(second.finish_reason == FinishReason::kCancelled);
  CHECK(second.tokens.empty());
  CHECK_FALSE(engine.cancel(a));
  CHECK(engine.stats().cancelled == 2);
}

TEST_CASE("submit refuses when the queue is full, and accepts again later", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.max_requests = 1;
  options.max_queue = 2;
  Engine engine(options);
  const auto voice = fixture.voice(engine);
  std::promise<void> started, release;
  auto released = release.get_future().share();
  Request blocking = endless(fixture, voice, 2);
  blocking.on_tokens = [&, first = true](const Progress&) mutable {
    if (std::exchange(first, false)) started.set_value();
    released.wait();
    return true;
  };
  std::vector<uint64_t> ids{engine.submit(blocking)};
  arrive(started);
  ids.push_back(engine.submit(endless(fixture, voice, 2)));
  ids.push_back(engine.submit(endless(fixture, voice, 2)));
  CHECK_THROWS_AS(engine.submit(endless(fixture, voice, 2)), QueueFull);
  release.set_value();
  for (const uint64_t id : ids) CHECK(engine.wait(id).finish_reason == FinishReason::kLength);
  CHECK(engine.wait(engine.submit(endless(fixture, voice, 2))).tokens.size() == 2);
}

TEST_CASE("requests that cannot run are refused with the argument and the numbers", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.capacity = 80;
  options.max_rows = 1;
  Engine engine(options);
  const auto voice = fixture.voice(engine);
  Request request = endless(fixture, voice, 10);
  const auto refused_with = [&](const auto& change, const std::string& text) {
    Request changed = request;
    change(changed);
    INFO(text);
    CHECK_THROWS_WITH(engine.submit(changed), ContainsSubstring(text));
  };
  refused_with([](Request& r) { r.text_tokens.assign(60, 5); }, "positions, the KV cache a capacity of 80");
  refused_with([](Request& r) { r.max_new_tokens = 0; }, "max_new_tokens is 0, expected 1 to 4096");
  refused_with([](Request& r) { r.sampling.cfg_weight = 0.5f; }, "needs 2 rows of the KV cache, it has 1");
  refused_with([](Request& r) { r.sampling.top_p = 0; }, "top_p is 0, expected above 0");
  refused_with([](Request& r) { r.sampling.min_p = 2; }, "min_p is 2");
  refused_with([](Request& r) { r.sampling.temperature = std::nanf(""); }, "temperature is nan");
  refused_with([](Request& r) { r.sampling.repetition_penalty = 0; }, "repetition_penalty is 0");
  refused_with([](Request& r) { r.sampling.top_k = -1; }, "top_k is -1");
  refused_with([](Request& r) { r.text_tokens = {3, 704}; }, "text_tokens has 704, the vocabulary has 704");
  refused_with([](Request& r) { r.text_tokens.assign(3000, 5); }, "takes at most 2048");
  refused_with([](Request& r) { r.voice = nullptr; }, "no voice");
  refused_with(
      [](Request& r) {
        r.sampling.rng = Rng::kTorch;
        r.sampling.generator_state = "no state";
      },
      "generator_state is no state of a generator of cpu");
  CHECK(engine.wait(engine.submit(request)).tokens.size() == 10);
}

TEST_CASE("a request whose cache row is full ends with what fits, and its neighbours go on", "[engine]") {
  for (const char* fused : {"off", "on"}) {
    INFO("fused_step " << fused);
    const EngineFixture fixture;
    EngineOptions options = fixture.options();
    options.fused_step = fused;
    options.capacity = 80;
    Engine engine(options);
    const auto voice = fixture.voice(engine);
    Request longest = endless(fixture, voice, 400), other = endless(fixture, voice, 20);
    longest.ignore_stop = other.ignore_stop = true;
    other.sampling.seed = 3;
    other.sampling.cfg_weight = 0.5f;
    const Result alone = engine.wait(engine.submit(other));
    const uint64_t a = engine.submit(longest), b = engine.submit(other);
    const Result full = engine.wait(a);
    CHECK(full.finish_reason == FinishReason::kLength);
    CHECK(static_cast<int64_t>(full.tokens.size()) == 80 - full.prompt_tokens);
    CHECK_THAT(full.detail, ContainsSubstring("the KV cache is full: its capacity is 80 positions"));
    const Result beside = engine.wait(b);
    CHECK(beside.tokens == alone.tokens);
    CHECK(beside.tokens.size() == 20);
    CHECK(beside.detail.empty());
    // A row that was full serves the next request as well as any.
    for (int i = 0; i < 8; ++i) CHECK(engine.wait(engine.submit(other)).tokens == alone.tokens);
  }
}

TEST_CASE("a request that ignores the stop token goes on to its last token", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  const int64_t stop = engine.manifest().speech.stop_token;
  // Seeds are tried until one draws the stop token; evenly drawn from 8194 ids, many tokens are needed.
  Request request = endless(fixture, voice, 400);
  for (request.sampling.seed = 0; request.sampling.seed < 200; ++request.sampling.seed) {
    request.ignore_stop = true;
    const auto all = engine.wait(engine.submit(request)).tokens;
    REQUIRE(all.size() == 400);
    const auto found = std::find(all.begin(), all.end(), stop);
    if (found == all.end()) continue;
    request.ignore_stop = false;
    const Result stopped = engine.wait(engine.submit(request));
    CHECK(stopped.finish_reason == FinishReason::kStop);
    CHECK(stopped.tokens == std::vector<int64_t>(all.begin(), found));
    return;
  }
  FAIL("no seed drew the stop token");
}

TEST_CASE("fused steps give the tokens of steps layer by layer, and are counted", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.fused_step = "off";
  Engine layers(options);
  options.fused_step = "on";
  Engine fused(options);
  const auto voice = fixture.voice(layers);
  for (int i = 0; i < 6; ++i) {
    Request request = fixture.request(voice, 30, 4 + 3 * static_cast<size_t>(i));
    request.sampling.seed = 40 + i;
    request.sampling.cfg_weight = i % 3 == 0 ? 0.0f : 0.5f;
    request.sampling.temperature = i % 2 == 0 ? 0.0f : 0.9f;
    INFO("request " << i);
    CHECK(fused.wait(fused.submit(request)).tokens == layers.wait(layers.submit(request)).tokens);
  }
  CHECK(layers.stats().fused_steps == 0);
  CHECK_THAT(layers.stats().not_fused, ContainsSubstring("turned off"));
  CHECK(fused.stats().not_fused.empty());
  CHECK(fused.stats().fused_steps == fused.stats().decode_steps);
}

TEST_CASE("a deterministic engine gives a request the same tokens in any company", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.dtype = "bfloat16";  // where another order of sums would show
  options.deterministic = true;
  Engine engine(options);
  const auto voice = fixture.voice(engine);
  std::vector<Request> requests;
  for (int i = 0; i < 9; ++i) {
    Request request = fixture.request(voice, 10 + 9 * i, 4 + 3 * static_cast<size_t>(i));
    request.sampling.seed = 60 + i;
    request.sampling.cfg_weight = i % 3 == 0 ? 0.0f : 0.5f;
    requests.push_back(request);
  }
  std::vector<std::vector<int64_t>> alone;
  for (const Request& request : requests) alone.push_back(engine.wait(engine.submit(request)).tokens);
  std::vector<uint64_t> ids;
  for (const Request& request : requests) ids.push_back(engine.submit(request));
  for (size_t i = 0; i < ids.size(); ++i) {
    INFO("request " << i);
    CHECK(engine.wait(ids[i]).tokens == alone[i]);
  }
  CHECK(engine.stats().fused_steps == engine.stats().decode_steps);
}

TEST_CASE("a text of no tokens still generates", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  Request request = endless(fixture, fixture.voice(engine), 4);
  request.text_tokens.clear();
  const Result result = engine.wait(engine.submit(request));
  CHECK(result.prompt_tokens == engine.manifest().conditioning.length + 4);
  CHECK(result.tokens.size() <= 4);
}

TEST_CASE("a finished result is handed out once", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const uint64_t id = engine.submit(endless(fixture, fixture.voice(engine), 2));
  CHECK(engine.wait(id).status == Status::kFinished);
  CHECK_THROWS_WITH(engine.poll(id), ContainsSubstring("there is no request"));
  CHECK_THROWS_AS(engine.wait(12345), Error);
}

TEST_CASE("destroying an engine ends its requests", "[engine]") {
  const EngineFixture fixture;
  std::atomic<int> calls{0};
  {
    Engine engine(fixture.options());
    Request request = endless(fixture, fixture.voice(engine));
    request.on_tokens = [&](const Progress&) {
      ++calls;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return true;
    };
    for (int i = 0; i < 6; ++i) engine.submit(request);
    while (calls < 3) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(calls < 6 * 400);
}

TEST_CASE("many threads may submit, poll and cancel at once", "[engine]") {
  const EngineFixture fixture;
  Engine engine(fixture.options());
  const auto voice = fixture.voice(engine);
  std::vector<std::future<int64_t>> threads;
  for (int t = 0; t < 6; ++t) {
    threads.push_back(std::async(std::launch::async, [&, t] {
      int64_t tokens = 0;
      for (int i = 0; i < 4; ++i) {
        const uint64_t id = engine.submit(endless(fixture, voice, 5 + t));
        if ((t + i) % 3 == 0) engine.cancel(id);
        engine.stats();
        tokens += static_cast<int64_t>(engine.wait(id).tokens.size());
      }
      return tokens;
    }));
  }
  int64_t tokens = 0;
  for (auto& thread : threads) tokens += thread.get();
  const Stats stats = engine.stats();
  CHECK(stats.submitted == 24);
  CHECK(stats.finished + stats.cancelled == 24);
  CHECK(stats.generated_tokens == tokens);
}

TEST_CASE("a model whose records were changed is not loaded", "[engine]") {
  const EngineFixture fixture;
  std::ifstream file(fixture.options().model, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const Archive archive = Archive::open(fixture.options().model);
  const ArchiveRecord* weights = nullptr;
  for (const ArchiveRecord& record : archive.records()) {
    if (!record.deflated && (weights == nullptr || record.size > weights->size)) weights = &record;
  }
  REQUIRE(weights != nullptr);
  bytes[weights->offset + weights->size / 2] ^= 1;
  const TempFile changed(bytes, "changed.vivace");
  EngineOptions options = fixture.options();
  options.model = changed.path();
  CHECK_THROWS_AS(Engine(options), FileError);
  bytes.resize(bytes.size() / 2);
  changed.write(bytes);
  CHECK_THROWS_AS(Engine(options), FileError);
  options.model = "/nonexistent/t3.vivace";
  CHECK_THROWS_WITH(Engine(options), ContainsSubstring("/nonexistent/t3.vivace"));
}

TEST_CASE("options that cannot be met are refused", "[engine]") {
  const EngineFixture fixture;
  const auto refused_with = [&](const auto& change, const std::string& text) {
    EngineOptions options = fixture.options();
    change(options);
    INFO(text);
    CHECK_THROWS_WITH(Engine(options), ContainsSubstring(text));
  };
  refused_with([](EngineOptions& o) { o.device = "tpu"; }, "expected auto, cpu, cuda");
  refused_with([](EngineOptions& o) { o.dtype = "int8"; }, "expected auto, float32, bfloat16 or float16");
  refused_with([](EngineOptions& o) { o.max_requests = 0; }, "max_requests is 0");
  refused_with([](EngineOptions& o) { o.fused_step = "maybe"; }, "fused_step is \"maybe\", expected auto, on or off");
  refused_with([](EngineOptions& o) { o.deterministic = true, o.fused_step = "off"; }, "cannot run through decode_step");
  refused_with([](EngineOptions& o) { o.capacity = int64_t{1} << 40; }, "the KV cache needs");
}

TEST_CASE("weights can be converted when they are loaded", "[engine]") {
  const EngineFixture fixture;
  EngineOptions options = fixture.options();
  options.dtype = "bfloat16";
  Engine engine(options);
  CHECK(engine.wait(engine.submit(endless(fixture, fixture.voice(engine), 8))).tokens.size() == 8);
  CHECK(engine.stats().dtype == "bfloat16");
  CHECK(engine.stats().weight_bytes < 10'000'000);  // 15 MB in float32
}
