// The zip container of an exported model, read without torch: its records, its manifest, its digest.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "host/manifest.h"

namespace vivace {

struct ArchiveRecord {
  std::string name;      // path below the archive's top folder: "data/12", "extra/vivace.json"
  uint64_t offset;       // of its bytes in the file
  uint64_t stored_size;  // bytes in the file
  uint64_t size;         // bytes once decompressed
  bool deflated;         // torch deflates code, never tensors
};

/// An open TorchScript archive (zip, zip64). Refused: encryption, spanned archives, methods other than stored and deflate,
/// records that overlap or leave the file, duplicate names, more than one top folder, bytes after the directory's end.
class Archive {
 public:
  /// Reads the directory; throws FileError.
  static Archive open(const std::string& path);

  Archive(Archive&&) noexcept;
  Archive& operator=(Archive&&) noexcept;
  ~Archive();

  const std::string& path() const noexcept;
  uint64_t file_size() const noexcept;
  /// Sorted bytewise by name.
  const std::vector<ArchiveRecord>& records() const noexcept;
  const ArchiveRecord* find(std::string_view name) const noexcept;

  /// The record's bytes; throws FileError when it is absent, damaged or larger than `limit`.
  std::string read(std::string_view name, uint64_t limit) const;

  /// extra/vivace.json, parsed and checked; the digest is not.
  Manifest manifest() const;

  /// SHA-256 over every record but the manifest and torch's serialization id, in order of name: name, a zero byte, the
  /// record's own SHA-256 (32 bytes). 64 hexadecimal digits. Records are hashed in parallel by `threads` threads (0: one a
  /// core). `progress`, when set, is called now and then with bytes done, from one thread at a time; what it throws
  /// ends the digest and is passed on.
  std::string digest(int threads = 0, const std::function<void(uint64_t done, uint64_t total)>& progress = {}) const;

 private:
  struct State;
  explicit Archive(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// Opens, parses the manifest and recomputes the digest; throws FileError naming both digests when they differ.
Manifest verify_archive(const std::string& path, int threads = 0,
                        const std::function<void(uint64_t done, uint64_t total)>& progress = {});

}  // namespace vivace
