#include "host/safetensors.h"

#include <cstring>
#include <string>

#include "host/error.h"
#include "tests/host/catch.h"
#include "tests/host/files.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

std::string file_of(const std::string& header, size_t data_bytes) {
  std::string text;
  append<uint64_t>(text, header.size());
  text += header;
  for (size_t i = 0; i < data_bytes; ++i) text += static_cast<char>(i);
  return text;
}

const std::string kGood = file_of(
    R"({"__metadata__":{"format":"vivace-voice"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("none":{"dtype":"I64","shape":[0,4],"data_offsets":[24,24]},"scalar":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}  )",
    26);

std::string error_for(const std::string& content) {
  return error_of([&] { Safetensors::parse(bytes_of(content), "voice.safetensors"); });
}

std::string error_for_header(const std::string& header, size_t data_bytes) { return error_for(file_of(header, data_bytes)); }

}  // namespace

TEST_CASE("a good file gives views of its tensors and its metadata") {
  const TempFile file(kGood);
  const Safetensors tensors = Safetensors::open(file.path());
  REQUIRE(tensors.tensors().size() == 3);
  const SafetensorsView& a = tensors.at("a");
  CHECK(a.dtype == "F32");
  CHECK(a.shape == std::vector<int64_t>{2, 3});
  CHECK(a.numel() == 6);
  CHECK(a.data.size() == 24);
  CHECK(static_cast<int>(a.data[5]) == 5);
  CHECK(tensors.at("none").numel() == 0);
  CHECK(tensors.at("scalar").numel() == 1);
  CHECK(tensors.metadata().find("format")->second == "vivace-voice");
  CHECK(tensors.find("b") == nullptr);
  CHECK_THROWS_WITH(tensors.at("b"), ContainsSubstring("no tensor \"b\"; it has \"a\", \"none\", \"scalar\""));
}

TEST_CASE("the views stay good when the reader is moved") {
  const TempFile file(kGood);
  Safetensors first = Safetensors::open(file.path());
  const Safetensors second = std::move(first);
  CHECK(static_cast<int>(second.at("a").data[23]) == 23);
}

TEST_CASE("a missing file, a folder and an empty file are told apart") {
  CHECK_THROWS_WITH(Safetensors::open("/nonexistent/voice"), ContainsSubstring("cannot open: No such file"));
  CHECK_THROWS_WITH(Safetensors::open("/tmp"), ContainsSubstring("not a regular file"));
  const TempFile empty("");
  CHECK_THROWS_WITH(Safetensors::open(empty.path()), ContainsSubstring("the file has 0 bytes, expected 8"));
}

TEST_CASE("a file cut at any byte is refused") {
  for (size_t size = 0; size < kGood.size(); ++size) {
    INFO("cut to " << size << " bytes");
    CHECK(error_for(kGood.substr(0, size)) != "");
  }
}

TEST_CASE("a header longer than the file is refused with its length") {
  std::string text = kGood;
  put<uint64_t>(text, 0, UINT64_MAX);
  CHECK_THAT(error_for(text),
             ContainsSubstring("voice.safetensors: at byte 0: the header's length is 18446744073709551615"));
  put<uint64_t>(text, 0, text.size() - 7);
  CHECK_THAT(error_for(text), ContainsSubstring("truncated, or not safetensors"));
}

TEST_CASE("a torch.save file is recognised") {
  CHECK_THAT(error_for(std::string("PK\3\4") + std::string(100, 'x')), ContainsSubstring("`vivace voice` converts voices"));
}

TEST_CASE("headers that lie are refused by name") {
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  CHECK_THAT(error_for_header("[]", 0), ContainsSubstring("expected \"{\""));
  CHECK_THAT(error_for_header("{", 0), ContainsSubstring("header: not JSON"));
  CHECK_THAT(error_for_header("{}", 3), ContainsSubstring("3 bytes after the last tensor"));
  CHECK_THAT(error_for_header(tensor("\"F33\"", "[1]", "[0,4]"), 4), ContainsSubstring("dtype is \"F33\""));
  CHECK_THAT(error_for_header(tensor("7", "[1]", "[0,4]"), 4), ContainsSubstring("dtype is 7, expected a string"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[-1]", "[0,4]"), 4), ContainsSubstring("shape[0] is -1"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[1.5]", "[0,4]"), 4), ContainsSubstring("shape[0] is 1.5"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[18446744073709551615]", "[0,4]"), 4), ContainsSubstring("shape[0]"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[4294967296,4294967296]", "[0,0]"), 0),
             ContainsSubstring("expected a size that fits 64 bits"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[2]", "[0,4]"), 4), ContainsSubstring("expected 8 bytes for F32 [2]"));
  CHECK_THAT(error_for_header(tensor("\"F4\"", "[3]", "[0,1]"), 1), ContainsSubstring("data_offsets"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[1]", "[4,0]"), 4), ContainsSubstring("data_offsets [4, 0]"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[1]", "[-4,0]"), 4), ContainsSubstring("data_offsets[0] is -4"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[1]", "[0]"), 4), ContainsSubstring("expected two offsets"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[1]", "[4,8]"), 8), ContainsSubstring("(gap)"));
  CHECK_THAT(error_for_header(tensor("\"F32\"", "[2]", "[0,8]"), 4), ContainsSubstring("truncated"));
  CHECK_THAT(error_for_header(R"({"a":{"dtype":"U8"}})", 0), ContainsSubstring("shape is missing"));
  CHECK_THAT(error_for_header(R"({"__metadata__":{"k":1}})", 0), ContainsSubstring("expected a string"));
}

TEST_CASE("tensors that share bytes are refused") {
  const std::string header =
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})";
  CHECK_THAT(error_for_header(header, 6), ContainsSubstring("(overlap)"));
}

TEST_CASE("the same name twice is refused") {
  const std::string header =
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  CHECK_THAT(error_for_header(header, 1), ContainsSubstring("has the key \"a\" twice"));
}

TEST_CASE("a deeply nested header is refused without a deep stack") {
  std::string header = "{\"a\":";
  for (int i = 0; i < 1'000'000; ++i) header += '[';
  CHECK_THAT(error_for_header(header, 0), ContainsSubstring("nested deeper than"));
}

TEST_CASE("mutated safetensors files never crash") {
  std::mt19937 random(1);
  int refusals = 0;
  for (int round = 0; round < 6000; ++round) {
    const std::string text = mutate(kGood, random);
    refusals += refused([&] {
      const Safetensors tensors = Safetensors::parse(bytes_of(text), "mutated");
      uint64_t sum = 0;  // reads every byte that a view promises
      for (const auto& [name, view] : tensors.tensors()) {
        for (const std::byte byte : view.data) sum += static_cast<uint64_t>(byte);
      }
      volatile uint64_t sink = sum;
      (void)sink;
    });
  }
  CHECK(refusals > 3000);
}
