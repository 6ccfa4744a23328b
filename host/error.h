// Errors of the host: vivace::Error (csrc/error.h) for bad arguments, FileError for files that cannot be used.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "csrc/error.h"

namespace vivace {

/// A file that is missing, damaged or of another kind: "voice.safetensors: at byte 8: header is 12 bytes, expected ...".
class FileError : public Error {
 public:
  FileError(std::string path, const std::string& message);
  FileError(std::string path, uint64_t offset, const std::string& message);

  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
};

/// `text` between quotes, with control characters and invalid UTF-8 escaped and at most `limit` bytes of it:
/// names out of hostile files go through this before they reach a terminal.
std::string printable(std::string_view text, size_t limit = 80);

}  // namespace vivace
