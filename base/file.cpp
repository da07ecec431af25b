#include "base/file.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <utility>

#include "base/error.h"

namespace tailor {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

/// A file descriptor closed on scope exit.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

int open_or_throw(const fs::path& path, int flags, const char* doing) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  if (fd < 0) throw io_error(errno, doing, path.string());
  return fd;
}

void write_all(int fd, std::span<const std::byte> bytes, const fs::path& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      throw io_error(errno, "cannot write", path.string());
    }
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

/// Runs SHA-256 over pieces handed in by `feed(update)`.
template <class Feed>
std::string sha256_of(const Feed& feed) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(),
                                                                        &EVP_MD_CTX_free);
  TAILOR_CHECK(context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1);
  feed([&](const void* data, std::size_t size) {
    TAILOR_CHECK(EVP_DigestUpdate(context.get(), data, size) == 1);
  });
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  TAILOR_CHECK(EVP_DigestFinal_ex(context.get(), digest.data(), &size) == 1);
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out;
  for (unsigned int i = 0; i < size; ++i) {
    out += kHex[digest[i] >> 4U];
    out += kHex[digest[i] & 15U];
  }
  return out;
}

fs::path user_folder(const char* own, const char* xdg, const char* below_home) {
  if (const char* value = std::getenv(own); value != nullptr && *value != '\0') return value;
  if (const char* value = std::getenv(xdg); value != nullptr && *value != '\0') {
    return fs::path(value) / "tailor";
  }
  const char* home = std::getenv("HOME");
  return fs::path(home != nullptr ? home : "/root") / below_home / "tailor";
}

}  // namespace

std::string read_text(const fs::path& path) {
  const Descriptor file(open_or_throw(path, O_RDONLY, "cannot open"));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) throw io_error(errno, "cannot read", path.string());
  if (S_ISDIR(info.st_mode)) throw io_error(EISDIR, "cannot read", path.string());
  std::string out;
  out.reserve(static_cast<std::size_t>(std::max<off_t>(info.st_size, 0)));
  std::vector<char> piece(kBufferBytes);
  while (true) {
    const ssize_t n = ::read(file.get(), piece.data(), piece.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      throw io_error(errno, "cannot read", path.string());
    }
    if (n == 0) return out;
    out.append(piece.data(), static_cast<std::size_t>(n));
  }
}

void replace_atomically(const fs::path& path, const std::function<void(const fs::path&)>& fill) {
  static std::atomic<unsigned> counter{0};
  fs::path staging = path;
  staging += ".staging." + std::to_string(::getpid()) + "." + std::to_string(counter++);
  try {
    fill(staging);
    sync_path(staging);
    publish(staging, path);
  } catch (...) {
    ::unlink(staging.c_str());
    throw;
  }
}

void write_atomically(const fs::path& path, std::string_view bytes) {
  replace_atomically(path, [&](const fs::path& staging) {
    const Descriptor file(open_or_throw(staging, O_WRONLY | O_CREAT | O_TRUNC, "cannot create"));
    write_all(file.get(), std::as_bytes(std::span(bytes)), path);
  });
}

void make_folders(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) throw io_error(error.value(), "cannot create folder", path.string());
}

void publish(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) {
    throw io_error(errno, "cannot rename " + from.filename().string(), to.string());
  }
  const fs::path parent = to.parent_path();
  sync_path(parent.empty() ? fs::path(".") : parent);
}

void sync_path(const fs::path& path) {
  const Descriptor file(open_or_throw(path, O_RDONLY, "cannot open"));
  if (::fsync(file.get()) != 0 && errno != EINVAL && errno != EROFS) {
    throw io_error(errno, "cannot sync", path.string());
  }
}

int write_at(int descriptor, std::int64_t offset, std::span<const std::byte> bytes) noexcept {
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(descriptor, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
    offset += n;
  }
  return 0;
}

int reserve_file(int descriptor, std::int64_t bytes) noexcept {
  if (::fallocate(descriptor, 0, 0, bytes) != 0 && errno != EOPNOTSUPP) return errno;
  return ::ftruncate(descriptor, bytes) == 0 ? 0 : errno;
}

std::int64_t bytes_to_reserve(const fs::path& path, std::int64_t bytes) {
  struct stat info {};
  constexpr std::int64_t kStatBlock = 512;
  const std::int64_t taken = ::stat(path.c_str(), &info) == 0 ? info.st_blocks * kStatBlock : 0;
  return std::max<std::int64_t>(0, bytes - taken);
}

std::int64_t free_disk_bytes(const fs::path& folder) {
  struct statvfs disk {};
  if (::statvfs(folder.c_str(), &disk) != 0) throw io_error(errno, "cannot read", folder.string());
  return static_cast<std::int64_t>(disk.f_bavail) * static_cast<std::int64_t>(disk.f_frsize);
}

std::string sha256_hex(std::string_view bytes) {
  return sha256_of([&](const auto& update) { update(bytes.data(), bytes.size()); });
}

std::string sha256_file(const fs::path& path) {
  const Descriptor file(open_or_throw(path, O_RDONLY, "cannot open"));
  return sha256_of([&](const auto& update) {
    std::vector<char> piece(kBufferBytes);
    while (true) {
      const ssize_t n = ::read(file.get(), piece.data(), piece.size());
      if (n < 0) {
        if (errno == EINTR) continue;
        throw io_error(errno, "cannot read", path.string());
      }
      if (n == 0) return;
      update(piece.data(), static_cast<std::size_t>(n));
    }
  });
}

fs::path inside_folder(const fs::path& root, std::string_view name) {
  const auto refuse = [&](const std::string& why) {
    throw Error(Fault::bad_file,
                {"file name " + why + ": '" + std::string(name.substr(0, 200)) + "'", root.string(),
                 "A model or dataset may only name files in its own folder. Do not use this file "
                 "unless you trust where it came from."});
  };
  if (name.empty()) refuse("is empty");
  if (name.size() > 4096) refuse("is longer than 4,096 bytes");
  if (name.find('\0') != std::string_view::npos) refuse("holds a NUL byte");
  const fs::path relative(name);
  if (relative.is_absolute()) refuse("is absolute");
  for (const fs::path& part : relative) {
    if (part == "..") refuse("leads out of its folder");
  }
  const fs::path full = root / relative;
  std::error_code error;
  const fs::path real = fs::canonical(full, error);
  if (error) return full;  // not there: the opener says so with its own message
  const fs::path real_root = fs::canonical(root, error);
  const auto begins_with = [&](const fs::path& base) {
    return !base.empty() &&
           std::mismatch(base.begin(), base.end(), real.begin(), real.end()).first == base.end();
  };
  // The Hugging Face cache keeps snapshots/<commit>/file as links to ../../blobs/<hash>.
  const bool snapshot = real_root.parent_path().filename() == "snapshots";
  const fs::path blobs = snapshot ? real_root.parent_path().parent_path() / "blobs" : fs::path();
  if (!begins_with(real_root) && !begins_with(blobs))
    refuse("is a link that leads out of its folder");
  return full;
}

MappedFile::MappedFile(const fs::path& path) : path_(path) {
  const Descriptor file(open_or_throw(path, O_RDONLY, "cannot open"));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) throw io_error(errno, "cannot read", path.string());
  if (!S_ISREG(info.st_mode)) throw io_error(EISDIR, "cannot read", path.string());
  size_ = static_cast<std::size_t>(info.st_size);
  if (size_ == 0) return;
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) throw io_error(errno, "cannot map", path.string());
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::drop(std::size_t offset, std::size_t size) const noexcept {
  if (data_ == nullptr) return;
  constexpr std::size_t kPage = 4096;
  const std::size_t begin = offset / kPage * kPage;
  const std::size_t end = std::min(size_, offset + size);
  if (end > begin) ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
}

FileWriter::FileWriter(const fs::path& path, bool append)
    : path_(path),
      descriptor_(open_or_throw(path, O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC),
                                "cannot create")) {
  buffer_.reserve(kBufferBytes);
}

FileWriter::~FileWriter() {
  if (descriptor_ < 0) return;
  try {
    flush();
  } catch (const Error&) {  // a destructor may not throw: close() is where errors are told
  }
  ::close(descriptor_);
}

void FileWriter::write(std::span<const std::byte> bytes) {
  bytes_written_ += static_cast<std::int64_t>(bytes.size());
  if (buffer_.size() + bytes.size() > kBufferBytes) flush();
  if (bytes.size() >= kBufferBytes) {
    write_all(descriptor_, bytes, path_);
  } else {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
}

void FileWriter::write(std::string_view text) { write(std::as_bytes(std::span(text))); }

void FileWriter::flush() {
  const std::vector<std::byte> full = std::exchange(buffer_, {});
  buffer_.reserve(kBufferBytes);
  write_all(descriptor_, full, path_);
}

void FileWriter::close() {
  flush();
  if (::fsync(descriptor_) != 0 && errno != EINVAL) {
    throw io_error(errno, "cannot sync", path_.string());
  }
  const int result = ::close(std::exchange(descriptor_, -1));
  if (result != 0) throw io_error(errno, "cannot close", path_.string());
}

fs::path cache_folder() { return user_folder("TAILOR_CACHE", "XDG_CACHE_HOME", ".cache"); }
fs::path data_folder() { return user_folder("TAILOR_DATA", "XDG_DATA_HOME", ".local/share"); }

}  // namespace tailor
