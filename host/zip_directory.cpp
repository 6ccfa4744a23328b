#include "host/zip_directory.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "host/error.h"

namespace vivace {
namespace {

static_assert(std::endian::native == std::endian::little, "zip fields are read as they lie in the file");

// APPNOTE.TXT 6.3: 4.3.7 local header, 4.3.12 directory entry, 4.3.14-16 end records.
constexpr uint32_t kLocalMagic = 0x04034b50, kEntryMagic = 0x02014b50, kEndMagic = 0x06054b50;
constexpr uint32_t kEnd64Magic = 0x06064b50, kLocator64Magic = 0x07064b50;
constexpr uint64_t kLocalSize = 30, kEntrySize = 46, kEndSize = 22, kEnd64Size = 56, kLocator64Size = 20;
constexpr uint16_t kFlagEncrypted = 1 | 1 << 6 | 1 << 13, kFlagPatch = 1 << 5;
constexpr uint16_t kStored = 0, kDeflate = 8, kZip64Extra = 1;
constexpr uint64_t kMaxDirectory = uint64_t{1} << 28;
constexpr uint32_t kIn64 = 0xFFFFFFFF;  // the real number is in the zip64 extra field

template <typename T>
T field(const std::byte* base, size_t offset) {
  T value;
  std::memcpy(&value, base + offset, sizeof(T));
  return value;
}

template <size_t N>
struct Block {
  std::byte bytes[N];
  template <typename T>
  T get(size_t offset) const {
    return field<T>(bytes, offset);
  }
};

template <size_t N>
Block<N> read_block(const InputFile& file, uint64_t offset, uint32_t magic, const char* what) {
  Block<N> block;
  if (offset > file.size() || file.size() - offset < N) {
    throw FileError(file.path(), offset, std::string("the file ends inside ") + what + ": truncated");
  }
  file.read(offset, block.bytes);
  if (block.template get<uint32_t>(0) != magic) {
    throw FileError(file.path(), offset, std::string("expected ") + what + ": not a zip archive, or damaged");
  }
  return block;
}

struct Directory {
  uint64_t offset, size, entries;
  uint64_t end;  // where the end records begin
};

Directory find_directory(const InputFile& file) {
  const std::string& path = file.path();
  if (file.size() < kEndSize) {
    throw FileError(path, "the file has " + std::to_string(file.size()) + " bytes: not a zip archive");
  }
  std::array<std::byte, 9> head;  // of safetensors: the header's length, and its first character
  file.read(0, head);
  if (head[8] == std::byte{'{'}) {
    throw FileError(path, 0, "a safetensors file, expected a zip archive; `vivace export` makes a model of a checkpoint");
  }
  const uint64_t end_offset = file.size() - kEndSize;
  const auto end = read_block<kEndSize>(file, end_offset, kEndMagic, "the end of the zip directory as the last 22 bytes");
  uint64_t disks = end.get<uint16_t>(4) | end.get<uint16_t>(6);
  uint64_t here = end.get<uint16_t>(8);
  Directory directory{end.get<uint32_t>(16), end.get<uint32_t>(12), end.get<uint16_t>(10), end_offset};
  if (end.get<uint16_t>(20) != 0) throw FileError(path, end_offset, "the zip archive has a comment, expected none");

  const bool maxed = directory.offset == kIn64 || directory.size == kIn64 || directory.entries == 0xFFFF;
  uint32_t magic = 0;
  if (end_offset >= kLocator64Size) {
    file.read(end_offset - kLocator64Size, std::as_writable_bytes(std::span(&magic, 1)));
  }
  if (magic == kLocator64Magic) {
    const uint64_t locator_offset = end_offset - kLocator64Size;
    const auto locator = read_block<kLocator64Size>(file, locator_offset, kLocator64Magic, "a zip64 locator");
    const auto end64_offset = locator.get<uint64_t>(8);
    if (locator_offset < kEnd64Size || end64_offset != locator_offset - kEnd64Size) {
      throw FileError(
          path, locator_offset,
          "the zip64 locator points to " + std::to_string(end64_offset) + ", expected the record right before it");
    }
    const auto end64 = read_block<kEnd64Size>(file, end64_offset, kEnd64Magic, "the zip64 end of the directory");
    disks |= end64.get<uint32_t>(16) | end64.get<uint32_t>(20) | locator.get<uint32_t>(4);
    here = end64.get<uint64_t>(24);
    const Directory in64{end64.get<uint64_t>(48), end64.get<uint64_t>(40), end64.get<uint64_t>(32), end64_offset};
    const auto agrees = [](uint64_t small, uint64_t most, uint64_t large) { return small == most || small == large; };
    if (!agrees(directory.offset, kIn64, in64.offset) || !agrees(directory.size, kIn64, in64.size) ||
        !agrees(directory.entries, 0xFFFF, in64.entries)) {
      throw FileError(path, end64_offset, "the zip and the zip64 end of the directory contradict each other");
    }
    directory = in64;
  } else if (maxed) {
    throw FileError(path, end_offset, "a zip64 archive without its zip64 records");
  }

  if (disks != 0 || here != directory.entries) throw FileError(path, end_offset, "a zip archive of several disks");
  if (directory.offset > directory.end || directory.end - directory.offset != directory.size) {
    throw FileError(path, end_offset,
                    "the zip directory is " + std::to_string(directory.size) + " bytes from " +
                        std::to_string(directory.offset) + ", expected it to end at " + std::to_string(directory.end));
  }
  if (directory.size > kMaxDirectory || directory.entries > directory.size / kEntrySize) {
    throw FileError(path, end_offset,
                    "a zip directory of " + std::to_string(directory.entries) + " entries in " +
                        std::to_string(directory.size) + " bytes");
  }
  return directory;
}

/// What an entry of the directory says, before its local header is looked at.
struct RawEntry {
  ZipEntry entry;
  uint64_t header_offset;
};

/// Replaces the sizes and the offset that are kIn64 by those of the zip64 extra field, in their fixed order.
void apply_zip64(const InputFile& file, uint64_t at, std::span<const std::byte> extra, RawEntry& raw) {
  uint64_t* const numbers[] = {&raw.entry.size, &raw.entry.stored_size, &raw.header_offset};
  bool found = false;
  while (extra.size() >= 4) {
    const auto id = field<uint16_t>(extra.data(), 0);
    const auto size = field<uint16_t>(extra.data(), 2);
    if (size > extra.size() - 4) throw FileError(file.path(), at, "a zip extra field longer than its entry");
    std::span<const std::byte> body = extra.subspan(4, size);
    extra = extra.subspan(4 + size_t{size});
    if (id != kZip64Extra) continue;
    if (std::exchange(found, true)) throw FileError(file.path(), at, "two zip64 fields in one entry");
    for (uint64_t* number : numbers) {
      if (*number != kIn64) continue;
      if (body.size() < 8) throw FileError(file.path(), at, "a zip64 field that is too short");
      *number = field<uint64_t>(body.data(), 0);
      body = body.subspan(8);
    }
  }
  if (!found && std::any_of(std::begin(numbers), std::end(numbers), [](const uint64_t* n) { return *n == kIn64; })) {
    throw FileError(file.path(), at, "a zip64 entry without its zip64 field");
  }
}

/// Parses the entry at the front of `rest` and drops it; `at` is its offset in the file.
RawEntry take_entry(const InputFile& file, uint64_t at, std::span<const std::byte>& rest) {
  const std::string& path = file.path();
  if (rest.size() < kEntrySize || field<uint32_t>(rest.data(), 0) != kEntryMagic) {
    throw FileError(path, at, "expected an entry of the zip directory: damaged");
  }
  const std::byte* base = rest.data();
  const size_t name_size = field<uint16_t>(base, 28), extra_size = field<uint16_t>(base, 30);
  const size_t total = kEntrySize + name_size + extra_size + field<uint16_t>(base, 32);
  if (total > rest.size()) throw FileError(path, at, "an entry that is longer than the zip directory");

  RawEntry raw{};
  raw.entry.name.assign(reinterpret_cast<const char*>(base) + kEntrySize, name_size);
  raw.entry.stored_size = field<uint32_t>(base, 20);
  raw.entry.size = field<uint32_t>(base, 24);
  raw.header_offset = field<uint32_t>(base, 42);
  const std::string shown = printable(raw.entry.name);
  const auto flags = field<uint16_t>(base, 8), method = field<uint16_t>(base, 10);
  if ((flags & (kFlagEncrypted | kFlagPatch)) != 0) throw FileError(path, at, shown + " is encrypted or a patch");
  if (method != kStored && method != kDeflate) {
    throw FileError(path, at, shown + " has compression method " + std::to_string(method) + ", expected 0 or 8");
  }
  if (field<uint16_t>(base, 34) != 0) throw FileError(path, at, shown + " is on another disk");
  raw.entry.deflated = method == kDeflate;
  apply_zip64(file, at, rest.subspan(kEntrySize + name_size, extra_size), raw);
  if (!raw.entry.deflated && raw.entry.stored_size != raw.entry.size) {
    throw FileError(path, at,
                    shown + " is stored with " + std::to_string(raw.entry.stored_size) + " bytes, expected " +
                        std::to_string(raw.entry.size));
  }
  rest = rest.subspan(total);
  return raw;
}

/// Fills in where the bytes of the entry begin; its local header must tell the same name and method.
void locate(const InputFile& file, uint64_t directory_offset, RawEntry& raw) {
  const std::string shown = printable(raw.entry.name);
  const auto local = read_block<kLocalSize>(file, raw.header_offset, kLocalMagic, "a zip local header");
  const uint64_t name_size = local.get<uint16_t>(26);
  const uint64_t begin = raw.header_offset + kLocalSize + name_size + local.get<uint16_t>(28);
  if (begin > directory_offset || raw.entry.stored_size > directory_offset - begin) {
    throw FileError(
        file.path(), raw.header_offset,
        shown + " with " + std::to_string(raw.entry.stored_size) + " bytes leaves the room before the zip directory");
  }
  std::string name(name_size, '\0');
  file.read(raw.header_offset + kLocalSize, std::as_writable_bytes(std::span(name)));
  if (name != raw.entry.name || (local.get<uint16_t>(8) == kDeflate) != raw.entry.deflated) {
    throw FileError(file.path(), raw.header_offset,
                    "the local header of " + printable(name) + ", expected that of " + shown + ": damaged");
  }
  raw.entry.offset = begin;
}

}  // namespace

std::vector<ZipEntry> read_zip_directory(const InputFile& file) {
  const Directory directory = find_directory(file);
  std::vector<std::byte> bytes(directory.size);
  file.read(directory.offset, bytes);

  std::vector<RawEntry> raw;
  std::span<const std::byte> rest = bytes;
  for (uint64_t i = 0; i < directory.entries; ++i) {
    raw.push_back(take_entry(file, directory.offset + (bytes.size() - rest.size()), rest));
    locate(file, directory.offset, raw.back());
  }
  if (!rest.empty()) {
    throw FileError(file.path(), directory.offset + bytes.size() - rest.size(), "bytes after the zip directory's entries");
  }

  std::vector<const RawEntry*> in_file(raw.size());
  std::transform(raw.begin(), raw.end(), in_file.begin(), [](const RawEntry& entry) { return &entry; });
  std::sort(in_file.begin(), in_file.end(),
            [](const RawEntry* a, const RawEntry* b) { return a->header_offset < b->header_offset; });
  for (size_t i = 1; i < in_file.size(); ++i) {
    const ZipEntry& before = in_file[i - 1]->entry;
    if (before.offset + before.stored_size > in_file[i]->header_offset) {
      throw FileError(file.path(), in_file[i]->header_offset,
                      printable(in_file[i]->entry.name) + " begins inside " + printable(before.name));
    }
  }

  std::vector<ZipEntry> entries;
  for (RawEntry& entry : raw) entries.push_back(std::move(entry.entry));
  return entries;
}

}  // namespace vivace
