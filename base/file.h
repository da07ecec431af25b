#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

namespace fs = std::filesystem;

/// The whole file. Throws Error{io} naming the path when it cannot be read.
std::string read_text(const fs::path& path);

/// Replaces `path` with `bytes`: temporary file in the same folder, fsync, rename, fsync of the
/// folder. After a crash either the old or the new file is there, whole. Throws Error{io}
/// (also for a full disk); the old file is then untouched.
void write_atomically(const fs::path& path, std::string_view bytes);

/// As write_atomically, the content coming from `fill`, which is given the temporary path and must
/// have created and closed that file on return. The temporary file is removed if `fill` throws.
void replace_atomically(const fs::path& path, const std::function<void(const fs::path&)>& fill);

/// Creates `path` and its parents. Throws Error{io} with the folder that could not be made.
void make_folders(const fs::path& path);

/// Renames a folder or file and syncs the parent folder, so that the rename survives a power cut.
void publish(const fs::path& from, const fs::path& to);

/// fsync of a file or folder.
void sync_path(const fs::path& path);

/// Writes all of `bytes` at `offset`. 0, or the errno value of what failed.
int write_at(int descriptor, std::int64_t offset, std::span<const std::byte> bytes) noexcept;

/// Makes a file that many bytes long and takes its space on the disk, so that a disk that is too
/// small says so now; a file system that cannot take space is found out by the writes. 0, or the
/// errno value of what failed.
int reserve_file(int descriptor, std::int64_t bytes) noexcept;

/// What a file of `bytes` at `path` takes of the disk beyond what the one that is there has taken.
std::int64_t bytes_to_reserve(const fs::path& path, std::int64_t bytes);

/// Free bytes, for this user, of the disk that `folder` lies on. Throws Error{io}.
std::int64_t free_disk_bytes(const fs::path& folder);

/// Lower-case hexadecimal SHA-256 of bytes, or of a file read in pieces of 1 MiB.
std::string sha256_hex(std::string_view bytes);
std::string sha256_file(const fs::path& path);

/// `name` (taken from a model or dataset file) below `root`. Throws Error{bad_file} for absolute
/// names, names with `..`, NUL or over 4,096 bytes, and links that lead out of `root`, except that
/// links into the Hugging Face cache's own `blobs` folder beside `root` are followed.
fs::path inside_folder(const fs::path& root, std::string_view name);

/// A read-only memory map of a whole file. Move-only; unmapped on destruction.
class MappedFile {
 public:
  /// Throws Error{io} when the file cannot be opened. An empty file gives an empty span.
  explicit MappedFile(const fs::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  std::string_view text() const noexcept { return {reinterpret_cast<const char*>(data_), size_}; }
  const fs::path& path() const noexcept { return path_; }
  /// Tells the kernel that [offset, offset + size) is not needed soon, to bound resident memory.
  void drop(std::size_t offset, std::size_t size) const noexcept;

 private:
  fs::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// A writer for large files: sequential, buffered, errors become Error{io}.
class FileWriter {
 public:
  /// Creates or truncates; with `append` writes go to the end.
  explicit FileWriter(const fs::path& path, bool append = false);
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;
  /// Closes without a sync and ignores errors: call close() to learn of them.
  ~FileWriter();

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Pushes buffered bytes to the kernel (readers see them; a power cut may lose them).
  void flush();
  /// flush, fsync, close.
  void close();
  std::int64_t bytes_written() const noexcept { return bytes_written_; }

 private:
  fs::path path_;
  int descriptor_ = -1;
  std::vector<std::byte> buffer_;
  std::int64_t bytes_written_ = 0;
};

/// The user's cache folder for Tailor: $TAILOR_CACHE, else $XDG_CACHE_HOME/tailor, else
/// ~/.cache/tailor. Not created.
fs::path cache_folder();
/// The user's data folder (ledger): $TAILOR_DATA, else $XDG_DATA_HOME/tailor, else
/// ~/.local/share/tailor. Not created.
fs::path data_folder();

}  // namespace tailor
