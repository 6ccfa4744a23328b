// Text through the tokenizer or punc_norm, for tests that compare with Python's:
//   tokenize_lines TOKENIZER.json | punc_norm | punc_norm_multilingual | unicode   < in.jsonl > out.jsonl
// Input: one JSON string a line. Output: a line for each: a list of ids, a string, or {"error": "..."}.
// "unicode": no input; the version of the tables, then a line a code point: [is_word, is_white_space, is_space, is_lower,
// upper].

#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "host/punc_norm.h"
#include "host/tokenizer.h"
#include "host/unicode.h"

namespace {

using nlohmann::json;

void print_unicode() {
  std::cout << json(vivace::python_unicode_version()).dump() << '\n';
  for (char32_t c = 0; c < 0x110000; ++c) {
    std::string upper;
    if (vivace::is_python_lower(c)) vivace::append_python_upper(upper, c);
    std::cout << json{vivace::is_word(c), vivace::is_white_space(c), vivace::is_python_space(c), vivace::is_python_lower(c),
                      upper}
                     .dump()
              << '\n';
  }
}

void transform_lines(const std::function<json(const std::string&)>& transform) {
  for (std::string line; std::getline(std::cin, line);) {
    json result;
    try {
      result = transform(json::parse(line).get<std::string>());
    } catch (const std::exception& error) {
      result = {{"error", error.what()}};
    }
    std::cout << result.dump() << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s TOKENIZER.json | punc_norm | punc_norm_multilingual | unicode\n", argv[0]);
    return 2;
  }
  const std::string what = argv[1];
  try {
    if (what == "unicode") {
      print_unicode();
    } else if (what == "punc_norm") {
      transform_lines([](const std::string& text) { return vivace::punc_norm(text); });
    } else if (what == "punc_norm_multilingual") {
      transform_lines([](const std::string& text) { return vivace::punc_norm(text, vivace::PuncNorm::kMultilingual); });
    } else {
      // EnTokenizer where the file is one of Chatterbox's, else the bare tokenizer.
      auto bare = vivace::Tokenizer::from_file(what);
      if (bare.token_to_id("[SPACE]") >= 0) {
        auto english = std::make_shared<vivace::EnTokenizer>(std::move(bare), what);
        transform_lines([english](const std::string& text) { return english->encode(text); });
      } else {
        auto shared = std::make_shared<vivace::Tokenizer>(std::move(bare));
        transform_lines([shared](const std::string& text) { return shared->encode(text); });
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
