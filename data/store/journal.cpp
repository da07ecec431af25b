#include "data/store/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.h"

namespace tailor {
namespace {

constexpr std::string_view kFormat = "tailor-pack";
constexpr std::int64_t kVersion = 1;

std::string header_line(const PackJournal::Header& header) {
  return Json{{"format", kFormat},
              {"version", kVersion},
              {"mark", hash_text(header.mark)},
              {"source_forms", forms_json(header.forms)}}
             .dump() +
         "\n";
}

[[noreturn]] void refuse(const std::string& what, const fs::path& path) {
  throw Error(Fault::bad_file, {what, path.string(),
                                "Remove the begun store's folder, or choose another one with --to, "
                                "and pack again."});
}

PackJournal::Header read_header(std::string_view line, const fs::path& path) {
  try {
    const Json json = parse_json(line, path.string());
    const JsonReader reader(json, path.string());
    if (reader.text("format", "") == kFormat && reader.integer("version") == kVersion) {
      if (const auto mark = read_hex(reader.text("mark"))) {
        return {*mark, read_forms(reader.at("source_forms"), path.string())};
      }
    }
  } catch (const Error&) {  // told below
  }
  refuse("the journal of this begun store is damaged or of another version", path);
}

}  // namespace

std::optional<PackJournal::Header> PackJournal::begun(const fs::path& folder) {
  const fs::path path = folder / kJournalName;
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  const std::string text = read_text(path);
  const std::size_t end = text.find('\n');
  if (end == std::string::npos) return std::nullopt;
  return read_header(std::string_view(text).substr(0, end), path);
}

PackJournal::PackJournal(const fs::path& folder, const Header& header)
    : path_(folder / kJournalName) {
  try {
    take_lock();
    const std::string text = read_text(path_);
    const std::size_t first = text.find('\n');
    if (first == std::string::npos) {
      if (::ftruncate(descriptor_, 0) != 0) throw io_error(errno, "cannot write", path_.string());
      pending_ = header_line(header);
      sync();
      sync_path(folder);
      return;
    }
    if (read_header(std::string_view(text).substr(0, first), path_).mark != header.mark) {
      throw Error(Fault::usage,
                  {"this store was begun from another model or with other formats", path_.string(),
                   "Use the options it was begun with, or choose another folder with --to; nothing "
                   "was changed."});
    }
    std::size_t begin = first + 1;
    for (std::size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
      read_line(std::string_view(text).substr(begin, end - begin));
    }
    end_ = static_cast<off_t>(begin);
    if (begin != text.size() && ::ftruncate(descriptor_, end_) != 0) {
      throw io_error(errno, "cannot write", path_.string());
    }
  } catch (...) {
    if (descriptor_ >= 0) ::close(descriptor_);
    throw;
  }
}

void PackJournal::take_lock() {
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot open", path_.string());
  struct stat info {};
  // A process that finishes removes the file: a lock on what was removed is worth nothing.
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 || ::fstat(descriptor_, &info) != 0 ||
      info.st_nlink == 0) {
    throw Error(Fault::usage,
                {"another process is packing into this store", path_.parent_path().string(),
                 "Wait for it, or choose another folder with --to."});
  }
}

void PackJournal::read_line(std::string_view text) {
  try {
    const Json line = parse_json(text, path_.string());
    const JsonReader reader(line, path_.string());
    const std::int64_t kind = reader.integer("kind");
    const auto hash = read_hex(reader.text("hash"));
    if (!hash || kind < 1 || kind > static_cast<std::int64_t>(UnitKind::expert)) return;
    PackedUnit unit;
    unit.hash = *hash;
    unit.squared_error = reader.number("error", 0);
    unit.squares = reader.number("squares", 0);
    unit.absmax_squared_error = reader.number("absmax_error", 0);
    unit.sample = reader.text("sample", "");
    if (static_cast<UnitKind>(kind) == UnitKind::attention && unit.sample.empty()) return;
    units_[{static_cast<UnitKind>(kind), reader.integer("layer"), reader.integer("index")}] = unit;
  } catch (const Error&) {  // written when the machine went down: the unit counts as not packed
  }
}

PackJournal::~PackJournal() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void PackJournal::add(const UnitId& id, const PackedUnit& unit) {
  units_[id] = unit;
  Json line = {{"kind", static_cast<std::uint32_t>(id.kind)},
               {"layer", id.layer},
               {"index", id.index},
               {"hash", hash_text(unit.hash)}};
  if (!unit.sample.empty()) line["sample"] = unit.sample;
  if (unit.squares > 0) {
    line["error"] = unit.squared_error;
    line["squares"] = unit.squares;
    line["absmax_error"] = unit.absmax_squared_error;
  }
  pending_ += line.dump() + "\n";
}

void PackJournal::sync() {
  if (pending_.empty()) return;
  int error = 0;
  std::size_t done = 0;
  while (error == 0 && done < pending_.size()) {
    const ssize_t n = ::pwrite(descriptor_, pending_.data() + done, pending_.size() - done,
                               end_ + static_cast<off_t>(done));
    if (n >= 0) {
      done += static_cast<std::size_t>(n);
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  if (error == 0 && ::fdatasync(descriptor_) != 0) error = errno;
  if (error != 0) {
    // A line that is half there would spoil the one that is written after it.
    if (::ftruncate(descriptor_, end_) != 0) error = errno;
    throw io_error(error, "cannot write", path_.string());
  }
  end_ += static_cast<off_t>(pending_.size());
  pending_.clear();
}

void PackJournal::remove() {
  ::unlink(path_.c_str());
  sync_path(path_.parent_path());
}

}  // namespace tailor
