// Files for the tests of readers: temporary ones, and mutations of good ones.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include "host/error.h"

namespace vivace::testing {

/// A file with the given content, removed at the end of the scope.
class TempFile {
 public:
  explicit TempFile(std::string_view content, const std::string& name = "file") {
    static int count = 0;
    path_ = (std::filesystem::temp_directory_path() /
             ("vivace-" + std::to_string(::getpid()) + "-" + std::to_string(count++) + "-" + name))
                .string();
    write(content);
  }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile() { std::filesystem::remove(path_); }

  const std::string& path() const { return path_; }
  void write(std::string_view content) const {
    std::ofstream file(path_, std::ios::binary | std::ios::trunc);
    file.write(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file) throw std::runtime_error("cannot write " + path_);
  }

 private:
  std::string path_;
};

template <typename T>
void put(std::string& text, size_t offset, T value) {
  std::memcpy(text.data() + offset, &value, sizeof(T));
}

template <typename T>
void append(std::string& text, T value) {
  text.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

inline std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

/// One to four changes: a byte, a run of bytes, a 32-bit or 64-bit number of the kind that overflows, a cut, an insertion.
inline std::string mutate(std::string text, std::mt19937& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % std::max<size_t>(n, 1)); };
  constexpr uint64_t kNumbers[] = {0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, UINT64_MAX};
  for (size_t change = 0, changes = 1 + below(4); change < changes && !text.empty(); ++change) {
    const size_t at = below(text.size());
    switch (below(7)) {
      case 0: text[at] = static_cast<char>(random()); break;
      case 1: text[at] = static_cast<char>(text[at] ^ (1 << below(8))); break;
      case 2:
        if (at + 4 <= text.size()) put(text, at, static_cast<uint32_t>(kNumbers[below(9)]));
        break;
      case 3:
        if (at + 8 <= text.size()) put(text, at, kNumbers[below(9)]);
        break;
      case 4: text.erase(at, 1 + below(16)); break;
      case 5: text.insert(at, text.substr(below(text.size()), 1 + below(32))); break;
      default: text.resize(at);
    }
  }
  return text;
}

/// Whether `read` refuses with an error of ours; other exceptions pass.
template <typename Read>
bool refused(Read&& read) {
  try {
    read();
    return false;
  } catch (const Error&) {
    return true;
  }
}

/// The message of the FileError that `read` throws; "" when it throws none.
template <typename Read>
std::string error_of(Read&& read) {
  try {
    read();
    return "";
  } catch (const FileError& error) {
    return error.what();
  }
}

}  // namespace vivace::testing
