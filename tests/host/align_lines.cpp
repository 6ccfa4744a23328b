// Attention rows through the alignment analyzer, for tests that compare with Chatterbox's:
//   align_lines < in.jsonl > out.jsonl
// Input, a line a text: {"text_length": S, "steps": [{"rows": [...], "last_token": t}, ...]}.
// Output: {"decisions": ["none" | "suppress" | "force", ...], "positions": [...]}.
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "host/alignment.h"

int main() {
  using nlohmann::json;
  for (std::string line; std::getline(std::cin, line);) {
    const json text = json::parse(line);
    vivace::AlignmentAnalyzer analyzer(text["text_length"].get<int64_t>());
    json out = {{"decisions", json::array()}, {"positions", json::array()}};
    for (const json& step : text["steps"]) {
      const auto rows = step["rows"].get<std::vector<float>>();
      const auto decision = analyzer.step(rows, step["last_token"].get<int64_t>());
      out["decisions"].push_back(decision == vivace::AlignmentDecision::kNone           ? "none"
                                 : decision == vivace::AlignmentDecision::kSuppressStop ? "suppress"
                                                                                        : "force");
      out["positions"].push_back(analyzer.text_position());
    }
    std::cout << out.dump() << '\n';
  }
}
