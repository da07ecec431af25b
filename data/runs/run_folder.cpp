#include "data/runs/run_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "data/runs/ledger.h"

namespace tailor {
namespace {

constexpr std::string_view kFormat = "tailor run";
constexpr std::int64_t kVersion = 1;

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? std::string(name.data()) : "unknown";
}

/// What a folder holds besides the traces of a start that was cut short before the marker.
bool holds_files(const fs::path& folder) {
  std::error_code error;
  fs::directory_iterator entries(folder, error);
  if (error) throw io_error(error.value(), "cannot list", folder.string());
  for (const fs::directory_entry& entry : entries) {
    const std::string name = entry.path().filename().string();
    if (name != "run.lock" && !name.starts_with("run.json.staging.")) return true;
  }
  return false;
}

/// Refuses folders that may not be taken. Touches nothing.
void check_contents(const fs::path& folder, bool resume) {
  std::error_code error;
  const fs::file_status status = fs::status(folder, error);
  if (!fs::exists(status)) return;
  if (!fs::is_directory(status)) {
    throw Error(Fault::usage, {"output_dir is a file, a folder is needed", folder.string(),
                               "Name another output_dir."});
  }
  if (!RunFolder::run_in(folder).empty()) {
    if (resume) return;
    throw Error(Fault::usage, {"output_dir holds a run already", folder.string(),
                               "Go on with that run with --resume, or name another output_dir."});
  }
  if (holds_files(folder)) {
    throw Error(Fault::usage,
                {"output_dir holds files, but no run of Tailor's", folder.string(),
                 "Name another output_dir: a folder that does not exist yet, or an empty one."});
  }
}

/// Takes the folder's lock, which the kernel drops when the process ends, however it ends.
int take_lock(const fs::path& folder, const Clock& clock) {
  const fs::path path = RunFolder::lock(folder);
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) throw io_error(errno, "cannot write into output_dir", folder.string());
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int code = errno;
    std::array<char, 512> holder{};
    const ssize_t n = ::pread(fd, holder.data(), holder.size() - 1, 0);
    ::close(fd);
    if (code != EWOULDBLOCK) throw io_error(code, "cannot lock", path.string());
    const std::string who(trim({holder.data(), static_cast<std::size_t>(n > 0 ? n : 0)}));
    throw Error(Fault::usage,
                {"another process is training into output_dir" + (who.empty() ? "" : ": " + who),
                 folder.string(), "Wait for it to end, stop it, or name another output_dir."});
  }
  const std::string mine = "process " + std::to_string(::getpid()) + " on " + host_name() +
                           " since " + utc_text(clock.unix_ms()) + "\n";
  const bool written = ::ftruncate(fd, 0) == 0 && ::pwrite(fd, mine.data(), mine.size(), 0) ==
                                                      static_cast<ssize_t>(mine.size());
  if (!written) {
    const int code = errno != 0 ? errno : ENOSPC;
    ::close(fd);
    throw io_error(code, "cannot write into output_dir", folder.string());
  }
  return fd;
}

}  // namespace

RunFolder RunFolder::open(const fs::path& path, bool resume, const Clock& clock) {
  RunFolder folder;
  folder.path_ = fs::absolute(path).lexically_normal();
  if (!folder.path_.has_filename()) folder.path_ = folder.path_.parent_path();
  check_contents(folder.path_, resume);
  make_folders(folder.path_);
  folder.lock_descriptor_ = take_lock(folder.path_, clock);
  check_contents(folder.path_, resume);  // another process may have come between

  folder.run_ = run_in(folder.path_);
  folder.resumed_ = !folder.run_.empty();
  if (folder.resumed_) {  // the same bytes again, to learn now that the disk takes them
    write_atomically(marker(folder.path_), read_text(marker(folder.path_)));
  } else {
    folder.run_ = new_ulid(clock.unix_ms());
    const Json marker = {{"format", kFormat},
                         {"version", kVersion},
                         {"run", folder.run_},
                         {"created", utc_text(clock.unix_ms())}};
    write_atomically(RunFolder::marker(folder.path_), marker.dump(2) + "\n");
  }
  return folder;
}

RunFolder::RunFolder(RunFolder&& other) noexcept
    : path_(std::move(other.path_)),
      run_(std::move(other.run_)),
      resumed_(other.resumed_),
      lock_descriptor_(std::exchange(other.lock_descriptor_, -1)) {}

RunFolder& RunFolder::operator=(RunFolder&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(run_, other.run_);
  std::swap(resumed_, other.resumed_);
  std::swap(lock_descriptor_, other.lock_descriptor_);
  return *this;
}

RunFolder::~RunFolder() {
  if (lock_descriptor_ >= 0) ::close(lock_descriptor_);
}

void RunFolder::keep_experts(const fs::path& source) const {
  const std::string text = read_text(source), digest = sha256_hex(text);
  Json document = read_json(marker(path_));
  const std::string known = document.value("experts_sha256", std::string());
  if (!known.empty() && known != digest) {
    throw Error(Fault::usage,
                {"lora.experts is not the choice of experts that this run was started with: its "
                 "SHA-256 is " +
                     digest.substr(0, 16) + "..., needed: " + known.substr(0, 16) + "...",
                 source.string(),
                 "Go on with the run's own copy, lora.experts=" + experts().string() +
                     ", or train the other choice into another output_dir."});
  }
  std::error_code error;
  if (!fs::exists(experts(), error) || sha256_file(experts()) != digest) {
    write_atomically(experts(), text);
  }
  if (!known.empty()) return;
  document["experts_sha256"] = digest;
  write_atomically(marker(path_), document.dump(2) + "\n");
}

std::string RunFolder::run_in(const fs::path& folder) {
  const fs::path path = marker(folder);
  std::error_code error;
  if (!fs::exists(path, error)) return {};
  const Json document = read_json(path);
  if (!document.is_object() || document.value("format", Json()) != kFormat) return {};
  const JsonReader reader(document, path.string());
  const std::int64_t version = reader.integer("version");
  if (version != kVersion) {
    throw Error(Fault::usage,
                {"the run folder has version " + std::to_string(version) +
                     ", this Tailor knows version " + std::to_string(kVersion),
                 path.string(), "Use the newer Tailor that made it, or name another output_dir."});
  }
  return reader.text("run");
}

void require_free_bytes(const fs::path& path, std::int64_t bytes, const std::string& purpose) {
  const std::int64_t free_bytes = free_disk_bytes(path);
  if (free_bytes >= bytes) return;
  throw Error(Fault::does_not_fit,
              {bytes_text(bytes) + " of disk are needed for " + purpose + ", " +
                   bytes_text(free_bytes) + " are free",
               path.string(), "Free space on that disk, or name a folder on another one."});
}

}  // namespace tailor
