// The models that tests of the engine run: written by tests/fixtures/make_parity.py.
#pragma once

#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "host/engine.h"
#include "host/voice.h"

namespace vivace::testing {

struct EngineFixture {
  std::string directory;
  nlohmann::json expected;  // expected.json

  /// variant: "english" or "multilingual".
  explicit EngineFixture(const std::string& variant = "english") {
    const char* path = std::getenv(("VIVACE_TEST_MODEL_" + variant).c_str());
    if (path == nullptr) throw std::runtime_error("VIVACE_TEST_MODEL_" + variant + " is not set: run by ctest");
    directory = path;
    std::ifstream(directory + "/expected.json") >> expected;
  }

  EngineOptions options() const {
    EngineOptions o;
    o.model = directory + "/t3.vivace";
    o.device = "cpu";
    o.max_requests = 4;
    o.capacity = 512;
    return o;
  }
  std::shared_ptr<const Voice> voice(const Engine& engine) const {
    return std::make_shared<const Voice>(load_voice(directory + "/voice.safetensors", engine.manifest()));
  }
  /// The fixture's text, `length` of its tokens (0: all), with the defaults of Request.
  Request request(std::shared_ptr<const Voice> voice, int64_t max_new_tokens, size_t length = 0) const {
    Request r;
    r.text_tokens = expected["text_tokens"].get<std::vector<int64_t>>();
    if (length > 0) r.text_tokens.resize(length);
    r.voice = std::move(voice);
    r.max_new_tokens = max_new_tokens;
    return r;
  }
};

}  // namespace vivace::testing
