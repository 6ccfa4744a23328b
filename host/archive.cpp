#include "host/archive.h"

#include <zlib.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "host/digest.h"
#include "host/error.h"
#include "host/zip_directory.h"

namespace vivace {
namespace {

constexpr std::string_view kManifestRecord = "extra/vivace.json";
constexpr std::string_view kSerializationId = ".data/serialization_id";  // torch's own hash of the same records
constexpr uint64_t kMaxManifest = uint64_t{1} << 20;
constexpr size_t kChunk = size_t{1} << 18;  // stays in the second-level cache between the read and the hash

/// Hands the bytes of a record, decompressed, to `sink` in pieces; `buffer` is scratch for what is read.
template <typename Sink>
void stream_record(const InputFile& file, const ArchiveRecord& record, std::vector<std::byte>& buffer, Sink&& sink) {
  buffer.resize(kChunk);
  uint64_t read = 0;
  const auto next_chunk = [&] {
    const auto count = static_cast<size_t>(std::min<uint64_t>(kChunk, record.stored_size - read));
    file.read(record.offset + read, std::span(buffer).first(count));
    read += count;
    return std::span<const std::byte>(buffer).first(count);
  };
  if (!record.deflated) {
    while (read < record.stored_size) sink(next_chunk());
    return;
  }

  struct Inflater : z_stream {
    Inflater() : z_stream{} {
      if (inflateInit2(this, -MAX_WBITS) != Z_OK) throw std::bad_alloc();
    }
    ~Inflater() { inflateEnd(this); }
  } stream;
  std::vector<std::byte> output(kChunk);
  uint64_t written = 0;
  int status = Z_OK;
  while (status == Z_OK && (stream.avail_in > 0 || read < record.stored_size)) {
    if (stream.avail_in == 0) {
      const auto chunk = next_chunk();
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(chunk.data()));
      stream.avail_in = static_cast<uInt>(chunk.size());
    }
    do {
      stream.next_out = reinterpret_cast<Bytef*>(output.data());
      stream.avail_out = static_cast<uInt>(output.size());
      status = inflate(&stream, Z_NO_FLUSH);
      const size_t count = output.size() - stream.avail_out;
      if (count > record.size - written) status = Z_DATA_ERROR;  // more than the directory says: refuse before it is used
      if (status != Z_OK && status != Z_STREAM_END) break;
      written += count;
      sink(std::span<const std::byte>(output).first(count));
    } while (status == Z_OK && stream.avail_out == 0);
    if (status == Z_BUF_ERROR) status = Z_OK;  // wants more input
  }
  if (status != Z_STREAM_END || stream.avail_in != 0 || read != record.stored_size || written != record.size) {
    throw FileError(file.path(), record.offset,
                    printable(record.name) + " does not decompress to " + std::to_string(record.size) + " bytes: damaged");
  }
}

/// Reports bytes done to the caller's function, from one thread at a time and at most once every 8 MiB.
class Progress {
 public:
  Progress(const std::function<void(uint64_t, uint64_t)>& report, uint64_t total) : report_(report), total_(total) {}
  void add(uint64_t bytes) {
    if (!report_) return;
    const std::lock_guard lock(mutex_);
    done_ += bytes;
    if (done_ - reported_ < kStep && done_ != total_) return;
    reported_ = done_;
    report_(done_, total_);
  }

 private:
  static constexpr uint64_t kStep = uint64_t{8} << 20;
  const std::function<void(uint64_t, uint64_t)>& report_;
  const uint64_t total_;
  std::mutex mutex_;
  uint64_t done_ = 0, reported_ = 0;
};

bool hashed(const ArchiveRecord& record) { return record.name != kManifestRecord && record.name != kSerializationId; }

}  // namespace

struct Archive::State {
  explicit State(const std::string& path) : file(path) {}
  InputFile file;
  std::vector<ArchiveRecord> records;
};

Archive::Archive(std::unique_ptr<State> state) : state_(std::move(state)) {}
Archive::Archive(Archive&&) noexcept = default;
Archive& Archive::operator=(Archive&&) noexcept = default;
Archive::~Archive() = default;

Archive Archive::open(const std::string& path) {
  auto state = std::make_unique<State>(path);
  std::string top;
  for (ZipEntry& entry : read_zip_directory(state->file)) {
    const size_t slash = entry.name.find('/');
    const bool controls = std::any_of(entry.name.begin(), entry.name.end(), [](unsigned char c) { return c < 0x20; });
    if (slash == std::string::npos || slash == 0 || slash + 1 == entry.name.size() || controls) {
      throw FileError(path, "the archive has " + printable(entry.name) + ", expected names below one top folder");
    }
    if (top.empty()) top = entry.name.substr(0, slash + 1);
    if (!entry.name.starts_with(top)) {
      throw FileError(path, "the archive has " + printable(entry.name) + " outside of its top folder " + printable(top));
    }
    state->records.push_back({entry.name.substr(top.size()), entry.offset, entry.stored_size, entry.size, entry.deflated});
  }
  auto& records = state->records;
  std::sort(records.begin(), records.end(), [](const ArchiveRecord& a, const ArchiveRecord& b) { return a.name < b.name; });
  const auto twice = std::adjacent_find(records.begin(), records.end(),
                                        [](const ArchiveRecord& a, const ArchiveRecord& b) { return a.name == b.name; });
  if (twice != records.end()) throw FileError(path, "the archive has " + printable(twice->name) + " twice");
  return Archive(std::move(state));
}

const std::string& Archive::path() const noexcept { return state_->file.path(); }
uint64_t Archive::file_size() const noexcept { return state_->file.size(); }
const std::vector<ArchiveRecord>& Archive::records() const noexcept { return state_->records; }

const ArchiveRecord* Archive::find(std::string_view name) const noexcept {
  const auto& records = state_->records;
  const auto found = std::lower_bound(records.begin(), records.end(), name,
                                      [](const ArchiveRecord& record, std::string_view key) { return record.name < key; });
  return found != records.end() && found->name == name ? &*found : nullptr;
}

std::string Archive::read(std::string_view name, uint64_t limit) const {
  const ArchiveRecord* record = find(name);
  if (record == nullptr) throw FileError(path(), "the archive has no record " + printable(name));
  if (record->size > limit) {
    throw FileError(
        path(), record->offset,
        printable(name) + " has " + std::to_string(record->size) + " bytes, expected at most " + std::to_string(limit));
  }
  std::string content;
  std::vector<std::byte> buffer;
  stream_record(state_->file, *record, buffer, [&](std::span<const std::byte> bytes) {
    content.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  });
  return content;
}

Manifest Archive::manifest() const {
  if (find(kManifestRecord) == nullptr) {
    throw FileError(path(), "not a vivace model: the archive has no " + std::string(kManifestRecord) +
                                "; `vivace export` writes such files");
  }
  return parse_manifest(read(kManifestRecord, kMaxManifest), path());
}

std::string Archive::digest(int threads, const std::function<void(uint64_t, uint64_t)>& report) const {
  const std::vector<ArchiveRecord>& records = state_->records;
  std::vector<size_t> order;  // largest first, so that no thread is left with a large one at the end
  uint64_t total = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    if (!hashed(records[i])) continue;
    order.push_back(i);
    total += records[i].size;
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return records[a].size > records[b].size; });

  std::vector<Sha256Digest> digests(records.size());
  Progress progress(report, total);
  std::atomic<size_t> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      Sha256 hash;
      std::vector<std::byte> buffer;
      for (size_t i; (i = next.fetch_add(1)) < order.size();) {
        stream_record(state_->file, records[order[i]], buffer, [&](std::span<const std::byte> bytes) {
          hash.update(bytes);
          progress.add(bytes.size());
        });
        digests[order[i]] = hash.finish();
      }
    } catch (...) {
      next = order.size();  // the others stop after the record at hand
      const std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  const size_t wanted = threads > 0 ? static_cast<size_t>(threads) : std::max(1U, std::thread::hardware_concurrency());
  {
    std::vector<std::jthread> helpers;
    for (size_t i = 1; i < std::min(wanted, order.size()); ++i) helpers.emplace_back(work);
    work();
  }
  if (failure) std::rethrow_exception(failure);

  Sha256 whole;
  for (size_t i = 0; i < records.size(); ++i) {
    if (!hashed(records[i])) continue;
    whole.update(records[i].name).update(std::string_view("\0", 1)).update(std::as_bytes(std::span(digests[i])));
  }
  return to_hex(whole.finish());
}

Manifest verify_archive(const std::string& path, int threads, const std::function<void(uint64_t, uint64_t)>& progress) {
  const Archive archive = Archive::open(path);
  Manifest manifest = archive.manifest();
  const std::string digest = archive.digest(threads, progress);
  if (digest != manifest.digest) {
    throw FileError(path, "the records' SHA-256 is " + digest + ", expected " + manifest.digest +
                              " by the manifest: the file was damaged or changed after its export");
  }
  return manifest;
}

}  // namespace vivace
