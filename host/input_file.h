// A file read at given offsets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace vivace {

/// A regular file open for reading; any number of threads may read from one.
class InputFile {
 public:
  /// Throws FileError.
  explicit InputFile(const std::string& path);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();

  const std::string& path() const noexcept { return path_; }
  uint64_t size() const noexcept { return size_; }

  /// Fills all of `buffer` from `offset` on; throws FileError where the file ends before.
  void read(uint64_t offset, std::span<std::byte> buffer) const;

 private:
  std::string path_;
  uint64_t size_ = 0;
  int fd_ = -1;
};

}  // namespace vivace
