#include "data/store/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.h"
#include "base/json.h"

namespace tailor {
namespace {

UnitHash hash_from(const std::string& text) {
  UnitHash out{};
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<std::byte>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  return out;
}

std::string mark_text(const std::array<std::byte, 16>& mark) { return hash_text(mark); }

}  // namespace

PackJournal::PackJournal(const fs::path& folder, const std::array<std::byte, 16>& mark)
    : path_(folder / kJournalName) {
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot open", path_.string());
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    ::close(descriptor_);
    throw Error(Fault::usage, {"another process is packing into this store", folder.string(),
                               "Wait for it, or choose another folder with --to."});
  }
  try {
    const std::string text = read_text(path_);
    const std::size_t whole = text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n') + 1;
    if (whole != text.size() && ::ftruncate(descriptor_, static_cast<off_t>(whole)) != 0) {
      throw io_error(errno, "cannot write", path_.string());
    }
    if (::lseek(descriptor_, 0, SEEK_END) < 0) throw io_error(errno, "cannot seek", path_.string());
    if (whole == 0) {
      pending_ = Json{{"version", 1}, {"mark", mark_text(mark)}}.dump() + "\n";
      sync();
      sync_path(folder);
    } else {
      read_lines(text.substr(0, whole), mark);
    }
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

void PackJournal::read_lines(const std::string& text, const std::array<std::byte, 16>& mark) {
  bool first = true;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = text.find('\n', begin);
    const Json line = parse_json(std::string_view(text).substr(begin, end - begin), path_.string());
    begin = end + 1;
    const JsonReader reader(line, path_.string());
    if (first) {
      first = false;
      if (reader.text("mark", "") == mark_text(mark)) continue;
      throw Error(Fault::usage,
                  {"this store was begun from another model or with other formats", path_.string(),
                   "Use the options it was begun with, or choose another folder with --to."});
    }
    if (reader.has("sample")) {
      samples_[reader.integer("layer")] = reader.text("sample");
      continue;
    }
    const std::string hash = reader.text("hash");
    if (hash.size() != 32) continue;
    PackedUnit unit;
    unit.hash = hash_from(hash);
    unit.squared_error = reader.number("error", 0);
    unit.squares = reader.number("squares", 0);
    unit.absmax_squared_error = reader.number("absmax_error", 0);
    units_[{static_cast<UnitKind>(reader.integer("kind")), reader.integer("layer"),
            reader.integer("index")}] = unit;
  }
}

PackJournal::~PackJournal() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void PackJournal::add_sample(std::int64_t layer, const std::string& sha256) {
  samples_[layer] = sha256;
  pending_ += Json{{"layer", layer}, {"sample", sha256}}.dump() + "\n";
}

void PackJournal::add(const UnitId& id, const PackedUnit& unit) {
  units_[id] = unit;
  Json line = {{"kind", static_cast<std::uint32_t>(id.kind)},
               {"layer", id.layer},
               {"index", id.index},
               {"hash", hash_text(unit.hash)}};
  if (unit.squares > 0) {
    line["error"] = unit.squared_error;
    line["squares"] = unit.squares;
    line["absmax_error"] = unit.absmax_squared_error;
  }
  pending_ += line.dump() + "\n";
}

void PackJournal::sync() {
  std::size_t done = 0;
  while (done < pending_.size()) {
    const ssize_t n = ::write(descriptor_, pending_.data() + done, pending_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw io_error(errno, "cannot write", path_.string());
    done += static_cast<std::size_t>(n);
  }
  pending_.clear();
  if (::fdatasync(descriptor_) != 0) throw io_error(errno, "cannot write", path_.string());
}

void PackJournal::remove() {
  ::unlink(path_.c_str());
  sync_path(path_.parent_path());
}

}  // namespace tailor
