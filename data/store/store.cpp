#include "data/store/store.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

constexpr std::int64_t kStoreVersion = 1;
constexpr std::string_view kHex = "0123456789abcdef";

std::string to_hex(std::span<const std::byte> bytes) {
  std::string out;
  for (const std::byte b : bytes) {
    const auto value = std::to_integer<unsigned>(b);
    out += kHex[value >> 4U];
    out += kHex[value & 15U];
  }
  return out;
}

std::array<std::byte, 16> from_hex(const std::string& text, const std::string& where) {
  if (const auto bytes = read_hex(text)) return *bytes;
  throw Error(Fault::bad_file, {"'" + text + "' is not a digest of 32 hexadecimal digits", where,
                                "The store's manifest is damaged: pack the model again."});
}

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(Fault::bad_file, {what, where, "Pack the model again: tailor model pack."});
}

/// Matrices are the same in every layer but for a few: units name theirs by a number.
Json matrices_json(const std::vector<MatrixPlace>& matrices) {
  Json out = Json::array();
  for (const MatrixPlace& place : matrices) {
    out.push_back({static_cast<std::uint32_t>(place.role),
                   static_cast<std::uint32_t>(place.format.kind), place.format.group,
                   place.format.block_rows, place.format.block_columns, place.rows, place.columns});
  }
  return out;
}

std::int64_t integer_of(const Json& value, const std::string& where) {
  if (!value.is_number_integer() && !value.is_number_unsigned()) {
    refuse("a number in the store's manifest is not a whole number", where);
  }
  const auto out = value.get<std::int64_t>();
  if (out < 0 || out > (std::int64_t{1} << 50)) {
    refuse("a number in the store's manifest is out of range", where);
  }
  return out;
}

std::vector<MatrixPlace> read_matrices(const Json& json, const std::string& where) {
  if (!json.is_array() || json.size() > 32) refuse("matrices of a unit are not a list", where);
  std::vector<MatrixPlace> out;
  for (const Json& row : json) {
    if (!row.is_array() || row.size() != 7) refuse("a matrix is not a list of 7 numbers", where);
    std::int64_t numbers[7];
    for (std::size_t i = 0; i < 7; ++i) numbers[i] = integer_of(row[i], where);
    MatrixPlace place{};
    place.role = static_cast<MatrixRole>(numbers[0]);
    place.format.kind = static_cast<WeightKind>(numbers[1]);
    place.format.group = numbers[2];
    place.format.block_rows = numbers[3];
    place.format.block_columns = numbers[4];
    place.rows = numbers[5];
    place.columns = numbers[6];
    if (numbers[1] > static_cast<std::int64_t>(WeightKind::nf4) ||
        !matrix_possible(place.format, place.rows, place.columns)) {
      refuse("a matrix in the store's manifest has impossible sizes", where);
    }
    out.push_back(place);
  }
  return out;
}

/// XXH3 of a manifest's members before `digest`.
std::string digest_of(const Json& members) {
  const std::string text = members.dump();
  return hash_text(hash_unit(reinterpret_cast<const std::byte*>(text.data()),
                             narrow<std::int64_t>(text.size())));
}

/// How many units a model has, without listing them.
std::int64_t unit_count(const ModelSpec& spec) {
  const std::int64_t runs = div_ceil(spec.vocab, vocabulary_run_rows(spec));
  return runs * (spec.tied_head ? 1 : 2) + 1 + 2 * spec.layer_count() +
         spec.experts * spec.moe_layer_count();
}

/// A store's layout follows from its config.json and the formats of its matrices.
void check_layout(const ModelSpec& spec, const StoreManifest& manifest, const std::string& where) {
  const StoreLayout& layout = manifest.layout;
  const std::string what = "the units in the store's manifest are not those of its config.json";
  if (narrow<std::int64_t>(layout.units.size()) != unit_count(spec)) refuse(what, where);
  std::vector<WeightFormat> formats;
  for (const StoredUnit& unit : layout.units) {
    for (const MatrixPlace& place : unit.matrices) formats.push_back(place.format);
  }
  std::size_t next = 0;
  const auto stored = [&](const PublishedMatrix&) {
    if (next == formats.size()) refuse(what, where);
    return formats[next++];
  };
  if (!(make_layout(spec, StoreFormats{}, false, stored) == layout)) refuse(what, where);
  if (manifest.forms && manifest.forms->of_matrix.size() != formats.size()) refuse(what, where);
}

}  // namespace

UnitHash hash_unit(const std::byte* bytes, std::int64_t count) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes, static_cast<std::size_t>(count)));
  UnitHash out;
  static_assert(sizeof canonical.digest == sizeof out);
  std::memcpy(out.data(), canonical.digest, sizeof out);
  return out;
}

std::string hash_text(const UnitHash& hash) { return to_hex(hash); }

std::optional<std::array<std::byte, 16>> read_hex(const std::string& text) {
  std::array<std::byte, 16> out{};
  if (text.size() != 2 * out.size()) return std::nullopt;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto high = kHex.find(text[2 * i]), low = kHex.find(text[2 * i + 1]);
    if (high == std::string_view::npos || low == std::string_view::npos) return std::nullopt;
    out[i] = static_cast<std::byte>(high << 4U | low);
  }
  return out;
}

std::array<std::byte, 16> store_mark(const StoreLayout& layout, std::string_view config) {
  Json json;
  for (const StoreLayout::File& file : layout.files) json.push_back({file.name, file.bytes});
  for (const StoredUnit& unit : layout.units) {
    json.push_back({static_cast<std::uint32_t>(unit.id.kind), unit.id.layer, unit.id.index,
                    unit.offset, matrices_json(unit.matrices)});
  }
  const std::string digest = sha256_hex(json.dump() + "\n" + std::string(config));
  return from_hex(digest.substr(0, 32), kManifestName);
}

Json manifest_json(const StoreManifest& manifest) {
  Json out;
  out["format"] = "tailor-store";
  out["version"] = kStoreVersion;
  out["source"] = manifest.source;
  out["fingerprint"] = manifest.fingerprint;
  out["prefix"] = manifest.prefix;
  out["mark"] = to_hex(manifest.mark);
  Json files = Json::array();
  for (const auto& file : manifest.layout.files) files.push_back({file.name, file.bytes});
  out["files"] = std::move(files);
  if (manifest.forms) out["source_forms"] = forms_json(*manifest.forms);
  Json kinds = Json::array(), units = Json::array();
  for (std::size_t i = 0; i < manifest.layout.units.size(); ++i) {
    const StoredUnit& unit = manifest.layout.units[i];
    Json matrices = matrices_json(unit.matrices);
    const auto known = std::find(kinds.begin(), kinds.end(), matrices);
    const auto kind = known - kinds.begin();
    if (known == kinds.end()) kinds.push_back(std::move(matrices));
    units.push_back({static_cast<std::uint32_t>(unit.id.kind), unit.id.layer, unit.id.index,
                     unit.file, unit.offset, kind, to_hex(manifest.hashes[i])});
  }
  out["matrices"] = std::move(kinds);
  out["units"] = std::move(units);
  out["digest"] = digest_of(out);
  return out;
}

std::string manifest_text(const StoreManifest& manifest) {
  return manifest_json(manifest).dump() + "\n";
}

StoreManifest read_manifest(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  if (reader.text("format", "") != "tailor-store") refuse("this is not a store's manifest", where);
  if (reader.integer("version") != kStoreVersion) {
    refuse("store of version " + std::to_string(reader.integer("version")) +
               ", this program reads version " + std::to_string(kStoreVersion),
           where);
  }
  Json members = json;
  members.erase("digest");
  if (reader.text("digest", "") != digest_of(members)) {
    refuse("the store's manifest was changed: its digest does not fit", where);
  }
  StoreManifest out;
  out.source = reader.text("source");
  out.fingerprint = reader.text("fingerprint");
  out.prefix = reader.text("prefix", "");
  out.mark = from_hex(reader.text("mark"), where);
  if (reader.has("source_forms")) out.forms = read_forms(reader.at("source_forms"), where);
  for (const Json& file : reader.at("files")) {
    if (!file.is_array() || file.size() != 2 || !file[0].is_string()) {
      refuse("an entry of files is not [name, bytes]", where);
    }
    out.layout.files.push_back({file[0].get<std::string>(), integer_of(file[1], where)});
  }
  std::vector<std::vector<MatrixPlace>> kinds;
  for (const Json& kind : reader.at("matrices")) kinds.push_back(read_matrices(kind, where));
  for (const Json& entry : reader.at("units")) {
    if (!entry.is_array() || entry.size() != 7 || !entry[6].is_string()) {
      refuse("an entry of units is not a list of 7", where);
    }
    StoredUnit unit;
    const std::int64_t kind = integer_of(entry[0], where), matrices = integer_of(entry[5], where);
    unit.id = {static_cast<UnitKind>(kind), integer_of(entry[1], where),
               integer_of(entry[2], where)};
    unit.file = integer_of(entry[3], where);
    unit.offset = integer_of(entry[4], where);
    if (kind < 1 || kind > 6 || unit.file >= narrow<std::int64_t>(out.layout.files.size()) ||
        matrices >= narrow<std::int64_t>(kinds.size()) || unit.offset % kUnitAlignment != 0) {
      refuse("an entry of units is impossible", where);
    }
    unit.matrices = kinds[static_cast<std::size_t>(matrices)];
    unit.bytes = place_matrices(unit.matrices);
    if (unit.offset + unit.bytes > out.layout.files[static_cast<std::size_t>(unit.file)].bytes) {
      refuse(unit_text(unit.id) + " ends past the end of its file", where);
    }
    out.layout.units.push_back(std::move(unit));
    out.hashes.push_back(from_hex(entry[6].get<std::string>(), where));
  }
  out.layout.index();
  return out;
}

bool Store::is_store(const fs::path& folder) {
  std::error_code error;
  return fs::exists(folder / kManifestName, error) || fs::exists(folder / kJournalName, error);
}

Store Store::open(const fs::path& folder) {
  std::error_code error;
  const fs::path manifest_path = folder / kManifestName;
  if (!fs::exists(manifest_path, error)) {
    const bool begun = fs::exists(folder / kJournalName, error);
    throw Error(
        Fault::bad_file,
        {begun ? "this store is not finished" : "this folder is not a store", folder.string(),
         begun ? "Run the same `tailor model pack` command again: it goes on where it "
                 "stopped."
               : "Make one with: tailor model pack MODEL --to " + folder.string()});
  }
  Store out;
  out.folder_ = folder;
  out.spec_ = read_model_spec(folder);
  const std::string text = read_text(manifest_path);
  const Json json = parse_json(text, manifest_path.string());
  StoreManifest manifest = read_manifest(json, manifest_path.string());
  if (json.dump() + "\n" != text) {
    refuse("the store's manifest is not as it was written", manifest_path.string());
  }
  check_layout(out.spec_, manifest, manifest_path.string());
  out.layout_ = std::move(manifest.layout);
  out.hashes_ = std::move(manifest.hashes);
  out.source_ = std::move(manifest.source);
  out.fingerprint_ = std::move(manifest.fingerprint);
  out.prefix_ = std::move(manifest.prefix);
  out.forms_ = std::move(manifest.forms);
  out.mark_ = manifest.mark;
  const std::string config = read_text(folder / "config.json");
  if (store_mark(out.layout_, config) != out.mark_) {
    refuse("manifest and config.json do not belong together", manifest_path.string());
  }
  for (const StoreLayout::File& file : out.layout_.files) {
    const fs::path path = inside_folder(folder, file.name);
    const auto size = fs::file_size(path, error);
    if (error) {
      refuse("a file of the store is missing", path.string());
    }
    if (narrow<std::int64_t>(size) != file.bytes) {
      refuse("a file of the store has " + count_text(narrow<std::int64_t>(size)) + " bytes, " +
                 count_text(file.bytes) + " were written",
             path.string());
    }
  }
  return out;
}

namespace {

/// The format of the last matrix of the first unit of a kind: a projection, not a norm.
std::optional<WeightFormat> format_of(const StoreLayout& layout, UnitKind kind) {
  for (const StoredUnit& unit : layout.units) {
    if (unit.id.kind == kind && !unit.matrices.empty()) return unit.matrices.back().format;
  }
  return std::nullopt;
}

}  // namespace

WeightFormat Store::expert_format() const {
  return format_of(layout_, UnitKind::expert).value_or(other_format());
}

WeightFormat Store::other_format() const {
  return format_of(layout_, UnitKind::attention).value_or(WeightFormat::bf16());
}

const UnitHash& Store::hash(const StoredUnit& unit) const {
  const auto at = &unit - layout_.units.data();
  TAILOR_CHECK(at >= 0 && static_cast<std::size_t>(at) < hashes_.size());
  return hashes_[static_cast<std::size_t>(at)];
}

fs::path Store::path_of(const StoredUnit& unit) const {
  return inside_folder(folder_, layout_.files[static_cast<std::size_t>(unit.file)].name);
}

std::string Store::where(const StoredUnit& unit) const {
  return (folder_ / layout_.files[static_cast<std::size_t>(unit.file)].name).string() +
         ", offset " + std::to_string(unit.offset) + ": " + unit_text(unit.id);
}

void Store::check_header(const StoredUnit& unit, const std::byte* bytes) const {
  std::array<std::byte, static_cast<std::size_t>(kUnitHeaderBytes)> wanted;
  write_unit_header({unit.id, mark_, unit.bytes, unit.matrices}, wanted);
  if (std::memcmp(bytes, wanted.data(), wanted.size()) == 0) return;
  const UnitHeader header =
      read_unit_header({bytes, static_cast<std::size_t>(kUnitHeaderBytes)}, where(unit));
  if (header.model != mark_) {
    refuse("a tile of another store lies here", where(unit));
  }
  if (header.id != unit.id) {
    refuse("a tile of " + unit_text(header.id) + " lies here", where(unit));
  }
  refuse("the tile's header and the store's manifest disagree", where(unit));
}

void Store::check_hash(const StoredUnit& unit, const std::byte* bytes) const {
  const UnitHash found = hash_unit(bytes, unit.bytes);
  if (found == hash(unit)) return;
  throw Error(Fault::bad_file,
              {"a tile is damaged: its hash is " + hash_text(found) + ", " + hash_text(hash(unit)) +
                   " was written",
               where(unit),
               "Check the disk, then pack the model again; `tailor model verify` lists every "
               "damaged tile."});
}

}  // namespace tailor
