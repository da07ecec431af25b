#include "adapters/merge/journal.h"

#include "base/error.h"
#include "base/json.h"
#include "data/store/store.h"

namespace tailor {
namespace {

constexpr std::string_view kFormat = "tailor-merge-journal";
constexpr std::int64_t kVersion = 1;

/// What tells the merge that a journal is of; empty for a header that is not one's.
std::string mark_of(std::string_view header, const std::string& where) {
  try {
    const Json json = parse_json(header, where);
    const JsonReader reader(json, where);
    if (reader.text("format", "") == kFormat && reader.integer("version", 0) == kVersion) {
      return reader.text("mark", "");
    }
  } catch (const Error&) {  // not of this merge either
  }
  return {};
}

}  // namespace

std::string digest_text(const PieceDigest& digest) {
  return digest == PieceDigest{} ? std::string() : hash_text(digest);
}

std::optional<PieceDigest> digest_from_text(const std::string& text) {
  return text.empty() ? PieceDigest{} : read_hex(text);
}

MergeJournal::MergeJournal(const fs::path& folder, const std::string& mark)
    : lines_(folder / kName,
             {"another process is merging into this folder", folder.string(),
              "Wait for it, or choose another --out."},
             {Json{{"format", kFormat}, {"version", kVersion}, {"mark", mark}}.dump(),
              [&](std::string_view header) {
                if (mark_of(header, (folder / kName).string()) == mark) return;
                throw Error(Fault::usage,
                            {"another merge was begun here: of another base or adapter, or with "
                             "other options",
                             folder.string(),
                             "Use what it was begun with, or remove that folder, or choose another "
                             "--out; nothing was changed."});
              },
              [&](const JsonReader& line) { read_line(line); }}) {}

void MergeJournal::read_line(const JsonReader& line) {
  const std::int64_t job = line.integer("job");
  const auto in = digest_from_text(line.text("in")), out = digest_from_text(line.text("out"));
  const auto in_scales = digest_from_text(line.text("in_scales", "")),
             out_scales = digest_from_text(line.text("out_scales", ""));
  if (job < 0 || !in || !out || !in_scales || !out_scales) return;
  MergedPiece piece{*in, *out, *in_scales, *out_scales, {}};
  piece.sums.base_squares = line.number("base", 0);
  piece.sums.delta_squares = line.number("delta", 0);
  piece.sums.error_squares = line.number("error", 0);
  piece.sums.kept = line.number("kept", 0);
  done_[static_cast<std::size_t>(job)] = piece;
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
  lines_.add(line);
}

}  // namespace tailor
