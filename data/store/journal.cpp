#include "data/store/journal.h"

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
      .dump();
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
    : lines_(folder / kJournalName,
             {"another process is packing into this store", folder.string(),
              "Wait for it, or choose another folder with --to."},
             {header_line(header),
              [&](std::string_view line) {
                const fs::path path = folder / kJournalName;
                if (read_header(line, path).mark == header.mark) return;
                throw Error(
                    Fault::usage,
                    {"this store was begun from another model or with other formats", path.string(),
                     "Use the options it was begun with, or choose another folder with --to; "
                     "nothing was changed."});
              },
              [&](const JsonReader& line) { read_line(line); }}) {}

void PackJournal::read_line(const JsonReader& line) {
  const std::int64_t kind = line.integer("kind");
  const auto hash = read_hex(line.text("hash"));
  if (!hash || kind < 1 || kind > static_cast<std::int64_t>(UnitKind::expert)) return;
  PackedUnit unit;
  unit.hash = *hash;
  unit.squared_error = line.number("error", 0);
  unit.squares = line.number("squares", 0);
  unit.absmax_squared_error = line.number("absmax_error", 0);
  unit.sample = line.text("sample", "");
  if (static_cast<UnitKind>(kind) == UnitKind::attention && unit.sample.empty()) return;
  units_[{static_cast<UnitKind>(kind), line.integer("layer"), line.integer("index")}] = unit;
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
  lines_.add(line);
}

}  // namespace tailor
