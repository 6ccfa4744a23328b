#include "host/archive.h"

#include <map>
#include <stdexcept>
#include <string>

#include "host/digest.h"
#include "host/error.h"
#include "tests/host/catch.h"
#include "tests/host/files.h"
#include "tests/host/manifests.h"
#include "tests/host/zip_writer.h"

using namespace vivace;
using namespace vivace::testing;

namespace {

const std::string kCode(5000, 'x');

/// The digest as the format defines it, from the records alone.
std::string digest_of(const std::map<std::string, std::string>& records) {
  Sha256 whole, record;
  for (const auto& [name, content] : records) {
    const Sha256Digest digest = record.update(content).finish();
    whole.update(name).update(std::string_view("\0", 1)).update(std::as_bytes(std::span(digest)));
  }
  return to_hex(whole.finish());
}

const std::map<std::string, std::string> kRecords = {
    {"code/a.py", kCode}, {"data.pkl", "pickle"}, {"data/0", std::string(3'000'000, 'w')},
    {"data/1", ""},       {"data/10", "t"},       {"version", "3\n"}};

std::string manifest_with(const std::string& digest) {
  std::string json = kManifestJson;
  return json.replace(json.find(std::string(64, 'f')), 64, digest);
}

std::vector<ZipItem> items(const std::string& manifest, const std::string& top = "t3/") {
  std::vector<ZipItem> result = {{top + "extra/vivace.json", manifest}, {top + ".data/serialization_id", "123"}};
  for (const auto& [name, content] : kRecords) result.push_back({top + name, content, name.starts_with("code/")});
  return result;
}

std::string error_for(const std::vector<ZipItem>& list, bool zip64_end = true) {
  const TempFile file(zip_of(list, zip64_end));
  return error_of([&] {
    const Archive archive = Archive::open(file.path());
    archive.digest(1);
  });
}

}  // namespace

TEST_CASE("records are listed by name below the top folder, and read") {
  for (const bool zip64_end : {false, true}) {
    const TempFile file(zip_of(items(kManifestJson), zip64_end));
    const Archive archive = Archive::open(file.path());
    REQUIRE(archive.records().size() == kRecords.size() + 2);
    CHECK(archive.records()[0].name == ".data/serialization_id");
    for (const auto& [name, content] : kRecords) CHECK(archive.read(name, 1 << 22) == content);
    CHECK(archive.find("code/a.py")->deflated);
    CHECK(archive.find("data/2") == nullptr);
    CHECK_THROWS_WITH(archive.read("data/2", 10), ContainsSubstring("no record \"data/2\""));
    CHECK_THROWS_WITH(archive.read("data/0", 10), ContainsSubstring("\"data/0\" has 3000000 bytes, expected at most 10"));
    CHECK(archive.manifest().producer == "vivace 0.1.0");
  }
}

TEST_CASE("sizes and offsets in zip64 fields mean the same") {
  auto list = items(kManifestJson);
  for (ZipItem& item : list) item.zip64_extra = true;
  const TempFile file(zip_of(list));
  CHECK(Archive::open(file.path()).digest() == digest_of(kRecords));
}

TEST_CASE("the digest covers every record but the manifest and the serialization id, whatever the top folder") {
  for (const char* top : {"t3/", "archive/"}) {
    for (const int threads : {0, 1, 3, 64}) {
      const TempFile file(zip_of(items("{}", top)));
      CHECK(Archive::open(file.path()).digest(threads) == digest_of(kRecords));
    }
  }
}

TEST_CASE("an archive with the digest of its manifest is verified") {
  const std::string digest = digest_of(kRecords);
  const TempFile file(zip_of(items(manifest_with(digest))));
  CHECK(verify_archive(file.path()).digest == digest);
}

TEST_CASE("one changed byte of a record is found, and both digests are named") {
  const std::string digest = digest_of(kRecords);
  std::string text = zip_of(items(manifest_with(digest)));
  text[text.find("pickle")] = 'P';
  const TempFile file(text);
  const std::string message = error_of([&] { verify_archive(file.path()); });
  auto changed = kRecords;
  changed["data.pkl"] = "Pickle";
  CHECK_THAT(message, ContainsSubstring("SHA-256 is " + digest_of(changed) + ", expected " + digest));
}

TEST_CASE("an added or a removed record is found") {
  auto list = items(manifest_with(digest_of(kRecords)));
  list.push_back({"t3/code/evil.py", "import os"});
  const TempFile added(zip_of(list));
  CHECK_THAT(error_of([&] { verify_archive(added.path()); }), ContainsSubstring("expected " + digest_of(kRecords)));
  list.erase(list.end() - 2, list.end());
  const TempFile removed(zip_of(list));
  CHECK_THAT(error_of([&] { verify_archive(removed.path()); }), ContainsSubstring("expected " + digest_of(kRecords)));
}

TEST_CASE("an archive without a manifest is not a vivace model") {
  const TempFile file(zip_of({{"m/data.pkl", "x"}}));
  CHECK_THAT(error_of([&] { verify_archive(file.path()); }), ContainsSubstring("not a vivace model"));
}

TEST_CASE("progress ends at the total and may end the digest by throwing") {
  const TempFile file(zip_of(items(kManifestJson)));
  const Archive archive = Archive::open(file.path());
  uint64_t last = 0, sum = 0;
  for (const auto& [name, content] : kRecords) sum += content.size();
  archive.digest(4, [&](uint64_t done, uint64_t total) {
    CHECK(total == sum);
    last = done;
  });
  CHECK(last == sum);
  CHECK_THROWS_AS(archive.digest(4, [](uint64_t, uint64_t) { throw std::domain_error("cancelled"); }), std::domain_error);
}

TEST_CASE("files that are no archive are named") {
  CHECK_THROWS_WITH(Archive::open("/nonexistent.vivace"), ContainsSubstring("/nonexistent.vivace: cannot open"));
  CHECK_THROWS_WITH(Archive::open("/tmp"), ContainsSubstring("not a regular file"));
  const TempFile small("PK"), text(std::string(1000, 'a'));
  CHECK_THROWS_WITH(Archive::open(small.path()), ContainsSubstring("the file has 2 bytes: not a zip archive"));
  CHECK_THROWS_WITH(Archive::open(text.path()), ContainsSubstring("not a zip archive, or damaged"));
  const TempFile checkpoint(std::string("\x02\0\0\0\0\0\0\0{}", 10) + std::string(1000, '\0'));
  CHECK_THROWS_WITH(Archive::open(checkpoint.path()),
                    ContainsSubstring("a safetensors file, expected a zip archive; `vivace export`"));
}

TEST_CASE("an archive cut anywhere is refused") {
  std::vector<ZipItem> list = {
      {"m/extra/vivace.json", "{}"}, {"m/code/a.py", std::string(300, 'a'), true}, {"m/data/0", "0123"}};
  const std::string good = zip_of(list);
  const TempFile file("");
  for (size_t size = 0; size < good.size(); ++size) {
    INFO("cut to " << size << " bytes");
    file.write(good.substr(0, size));
    CHECK(error_of([&] { Archive::open(file.path()); }) != "");
  }
}

TEST_CASE("archives that two readers could see differently are refused") {
  const std::string good = zip_of(items(kManifestJson));
  const TempFile trailing(good + "x");
  CHECK(error_of([&] { Archive::open(trailing.path()); }) != "");
  CHECK_THAT(error_for({{"m/a", "x"}, {"m/a", "y"}}), ContainsSubstring("\"a\" twice"));
  CHECK_THAT(error_for({{"m/a", "x"}, {"n/b", "y"}}), ContainsSubstring("outside of its top folder"));
  CHECK_THAT(error_for({{"a", "x"}}), ContainsSubstring("expected names below one top folder"));
  CHECK_THAT(error_for({{"m/", ""}}), ContainsSubstring("expected names below one top folder"));
  CHECK_THAT(error_for({{std::string("m/a\0b", 5), "x"}}), ContainsSubstring("m/a\\x00b"));
  CHECK_THAT(error_for({{"m/a", "x", false, "m/b"}}),
             ContainsSubstring("the local header of \"m/b\", expected that of \"m/a\""));
}

TEST_CASE("entries that leave the file, overlap or lie about their size are refused") {
  ZipItem item{"m/a", "0123456789"};
  item.stored_size = item.size = 1 << 20;
  CHECK_THAT(error_for({item}), ContainsSubstring("leaves the room before the zip directory"));
  item = {"m/a", "0123456789"};
  item.header_offset = 1 << 20;
  CHECK_THAT(error_for({item}), ContainsSubstring("truncated"));
  item.zip64_extra = true;
  item.header_offset = INT64_MAX;
  CHECK(error_for({item}) != "");
  item = {"m/a", "0123456789"};
  item.zip64_extra = true;
  item.stored_size = item.size = INT64_MAX;
  CHECK_THAT(error_for({item}), ContainsSubstring("leaves the room"));
  item = {"m/a", "0123456789"};
  item.size = 5;
  CHECK_THAT(error_for({item}), ContainsSubstring("is stored with 10 bytes, expected 5"));

  ZipItem first{"m/a", "0123456789"}, second{"m/a", "x"};
  second.header_offset = 0;
  CHECK_THAT(error_for({first, second}), ContainsSubstring("begins inside"));
}

TEST_CASE("deflated records that are damaged or longer than promised are refused") {
  ZipItem item{"m/a", kCode, true};
  item.size = 4999;
  CHECK_THAT(error_for({item}), ContainsSubstring("does not decompress to 4999 bytes"));
  item.size = 5001;
  CHECK_THAT(error_for({item}), ContainsSubstring("does not decompress to 5001 bytes"));
  item = {"m/a", std::string("\xff\xff\xff\xff")};
  item.method = 8;
  CHECK(error_for({item}) != "");
  ZipItem bomb{"m/a", std::string(50'000'000, '\0'), true};
  bomb.size = 10;
  CHECK_THAT(error_for({bomb}), ContainsSubstring("does not decompress to 10 bytes"));
}

TEST_CASE("encryption and other methods are refused by name") {
  ZipItem item{"m/a", "x"};
  item.flags = 0x809;
  CHECK_THAT(error_for({item}), ContainsSubstring("\"m/a\" is encrypted"));
  item = {"m/a", "x"};
  item.method = 14;
  CHECK_THAT(error_for({item}), ContainsSubstring("compression method 14, expected 0 or 8"));
}

TEST_CASE("mutated archives never crash") {
  std::vector<ZipItem> list = {
      {"m/extra/vivace.json", "{}"}, {"m/code/a.py", std::string(300, 'a'), true}, {"m/data/0", "0123"}};
  list[2].zip64_extra = true;
  const TempFile file("");
  int refusals = 0;
  std::mt19937 random(6);
  for (int round = 0; round < 4000; ++round) {
    file.write(mutate(zip_of(list, round % 2 == 0), random));
    refusals += refused([&] {
      const Archive archive = Archive::open(file.path());
      archive.digest(1);
      archive.manifest();
    });
  }
  CHECK(refusals > 3000);
}
