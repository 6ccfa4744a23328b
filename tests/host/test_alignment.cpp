#include "host/alignment.h"

#include "csrc/error.h"
#include "tests/host/catch.h"

using namespace vivace;

namespace {

/// `frames` rows of attention that look at one token each.
std::vector<float> looking_at(int64_t token, int64_t text, int frames = 1) {
  std::vector<float> rows(static_cast<size_t>(text * frames), 0.0f);
  for (int frame = 0; frame < frames; ++frame) rows[static_cast<size_t>(frame * text + token)] = 0.9f;
  return rows;
}

}  // namespace

TEST_CASE("the stop token is held back until the text is nearly spoken", "[alignment]") {
  constexpr int64_t kText = 10;
  AlignmentAnalyzer analyzer(kText);
  CHECK(analyzer.step(looking_at(0, kText, 2), 6561) == AlignmentDecision::kSuppressStop);
  for (int64_t token = 1; token < kText - 3; ++token) {
    CHECK(analyzer.step(looking_at(token, kText), 100 + token) == AlignmentDecision::kSuppressStop);
    CHECK(analyzer.text_position() == token);
    CHECK_FALSE(analyzer.complete());
  }
  CHECK(analyzer.step(looking_at(kText - 3, kText), 200) == AlignmentDecision::kNone);
  CHECK(analyzer.complete());
}

TEST_CASE("a token drawn twice in a row forces the stop", "[alignment]") {
  AlignmentAnalyzer analyzer(10);
  analyzer.step(looking_at(0, 10, 2), 6561);
  analyzer.step(looking_at(0, 10), 5);
  CHECK(analyzer.step(looking_at(0, 10), 5) == AlignmentDecision::kForceStop);
}

TEST_CASE("attention that stays on the last tokens forces the stop", "[alignment]") {
  constexpr int64_t kText = 8;
  AlignmentAnalyzer analyzer(kText);
  analyzer.step(looking_at(0, kText, 2), 6561);
  for (int64_t token = 1; token < kText; ++token) analyzer.step(looking_at(token, kText), 100 + token);
  int tail = 0;
  while (analyzer.step(looking_at(kText - 1, kText), 200 + tail) != AlignmentDecision::kForceStop) REQUIRE(++tail < 20);
  CHECK(tail == 4);  // 0.9 a frame: the sum over the last token reaches 5 with its sixth frame, one of which came before
}

TEST_CASE("attention that returns to the beginning after the end forces the stop", "[alignment]") {
  constexpr int64_t kText = 12;
  AlignmentAnalyzer analyzer(kText);
  analyzer.step(looking_at(0, kText, 2), 6561);
  for (int64_t token = 1; token <= kText - 3; ++token) analyzer.step(looking_at(token, kText), 100 + token);
  REQUIRE(analyzer.complete());
  int frames = 0;
  AlignmentDecision decision = AlignmentDecision::kNone;
  while ((decision = analyzer.step(looking_at(1, kText), 300 + frames)) != AlignmentDecision::kForceStop) {
    CHECK(decision == AlignmentDecision::kSuppressStop);
    REQUIRE(++frames < 20);
  }
  CHECK(frames == 5);
}

TEST_CASE("a jump in the text does not move the position", "[alignment]") {
  AlignmentAnalyzer analyzer(30);
  analyzer.step(looking_at(0, 30, 2), 6561);
  for (int64_t step = 1; step < 12; ++step) analyzer.step(looking_at(1, 30), step);
  analyzer.step(looking_at(11, 30), 50);
  CHECK(analyzer.text_position() == 1);
  analyzer.step(looking_at(7, 30), 51);
  CHECK(analyzer.text_position() == 7);
}

TEST_CASE("rows that are no multiple of the text are refused", "[alignment]") {
  AlignmentAnalyzer analyzer(7);
  const std::vector<float> rows(10);
  CHECK_THROWS_WITH(analyzer.step(rows, 0), ContainsSubstring("rows has 10 values, expected a multiple of the text's 7"));
}
