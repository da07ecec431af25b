#include "adapters/merge/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "base/error.h"
#include "base/json.h"

namespace tailor {
namespace {

constexpr std::string_view kFormat = "tailor-merge-journal";
constexpr std::int64_t kVersion = 1;

int nibble(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

}  // namespace

std::string digest_text(const PieceDigest& digest) {
  if (digest == PieceDigest{}) return {};
  std::string out;
  for (const std::byte byte : digest) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    out += kDigits[std::to_integer<std::size_t>(byte) >> 4U];
    out += kDigits[std::to_integer<std::size_t>(byte) & 15U];
  }
  return out;
}

std::optional<PieceDigest> digest_from_text(std::string_view text) {
  PieceDigest out{};
  if (text.empty()) return out;
  if (text.size() != 2 * out.size()) return std::nullopt;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const int high = nibble(text[2 * i]), low = nibble(text[2 * i + 1]);
    if (high < 0 || low < 0) return std::nullopt;
    out[i] = static_cast<std::byte>(high << 4 | low);
  }
  return out;
}

MergeJournal::MergeJournal(const fs::path& folder, const std::string& mark)
    : path_(folder / kName) {
  try {
    take_lock();
    const std::string text = read_text(path_);
    const std::size_t first = text.find('\n');
    if (first == std::string::npos) {
      if (::ftruncate(descriptor_, 0) != 0) throw io_error(errno, "cannot write", path_.string());
      pending_ = Json{{"format", kFormat}, {"version", kVersion}, {"mark", mark}}.dump() + "\n";
      sync();
      sync_path(folder);
      return;
    }
    std::string found;
    try {
      const Json json = parse_json(std::string_view(text).substr(0, first), path_.string());
      const JsonReader reader(json, path_.string());
      if (reader.text("format", "") == kFormat && reader.integer("version", 0) == kVersion) {
        found = reader.text("mark", "");
      }
    } catch (const Error&) {  // not of this merge either
    }
    if (found != mark) {
      throw Error(
          Fault::usage,
          {"another merge was begun here: of another base or adapter, or with other options",
           folder.string(),
           "Use what it was begun with, or remove that folder, or choose another --out; "
           "nothing was changed."});
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

void MergeJournal::take_lock() {
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) throw io_error(errno, "cannot open", path_.string());
  struct stat info {};
  // A process that finishes removes the file: a lock on what was removed is worth nothing.
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 || ::fstat(descriptor_, &info) != 0 ||
      info.st_nlink == 0) {
    throw Error(Fault::usage,
                {"another process is merging into this folder", path_.parent_path().string(),
                 "Wait for it, or choose another --out."});
  }
}

void MergeJournal::read_line(std::string_view text) {
  try {
    const Json line = parse_json(text, path_.string());
    const JsonReader reader(line, path_.string());
    const std::int64_t job = reader.integer("job");
    const auto in = digest_from_text(reader.text("in")), out = digest_from_text(reader.text("out"));
    const auto in_scales = digest_from_text(reader.text("in_scales", "")),
               out_scales = digest_from_text(reader.text("out_scales", ""));
    if (job < 0 || !in || !out || !in_scales || !out_scales) return;
    MergedPiece piece{*in, *out, *in_scales, *out_scales, {}};
    piece.sums.base_squares = reader.number("base", 0);
    piece.sums.delta_squares = reader.number("delta", 0);
    piece.sums.error_squares = reader.number("error", 0);
    piece.sums.kept = reader.number("kept", 0);
    done_[static_cast<std::size_t>(job)] = piece;
  } catch (const Error&) {  // written when the machine went down: the job counts as not done
  }
}

MergeJournal::~MergeJournal() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void MergeJournal::add(std::size_t job, const MergedPiece& piece) {
  done_[job] = piece;
  Json line = {{"job", job}, {"in", digest_text(piece.in)}, {"out", digest_text(piece.out)}};
  if (piece.in_scales != PieceDigest{}) line["in_scales"] = digest_text(piece.in_scales);
  if (piece.out_scales != PieceDigest{}) line["out_scales"] = digest_text(piece.out_scales);
  if (piece.sums.base_squares != 0 || piece.sums.delta_squares != 0) {
    line["base"] = piece.sums.base_squares;
    line["delta"] = piece.sums.delta_squares;
    line["error"] = piece.sums.error_squares;
    line["kept"] = piece.sums.kept;
  }
  pending_ += line.dump() + "\n";
}

void MergeJournal::sync() {
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

void MergeJournal::remove() {
  ::unlink(path_.c_str());
  sync_path(path_.parent_path());
}

}  // namespace tailor
