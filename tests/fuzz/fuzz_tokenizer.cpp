// libFuzzer: a tokenizer.json, a zero byte, and a text for it. See tests/fuzz/README.md.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "host/error.h"
#include "host/punc_norm.h"
#include "host/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = std::min(input.find('\0'), size);
  const std::string_view text = input.substr(std::min(end + 1, size));
  try {
    vivace::punc_norm(text);
    const auto tokenizer = vivace::Tokenizer::from_json(input.substr(0, end), "fuzz");
    tokenizer.decode(tokenizer.encode(text));
  } catch (const vivace::Error&) {
  }
  return 0;
}
