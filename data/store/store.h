#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/model_spec.h"
#include "data/store/layout.h"

namespace tailor {

/// XXH3, 128 bits, of a unit's bytes: header, codes, scales and padding.
using UnitHash = std::array<std::byte, 16>;
UnitHash hash_unit(const std::byte* bytes, std::int64_t count);
std::string hash_text(const UnitHash& hash);

/// A streaming store: the frozen weights of a model, packed unit by unit in the order training
/// reads them. Made by `tailor model pack`; docs/formats/store.md has it to the byte. The folder
/// also holds the model's config.json and tokenizer, so that it can stand for the model.
class Store {
 public:
  static bool is_store(const fs::path& folder);
  /// Reads and checks everything but the weights. Throws Error{bad_file}: no store, an unfinished
  /// one, another version, files that are missing or too short, a manifest that contradicts itself.
  static Store open(const fs::path& folder);

  const fs::path& folder() const { return folder_; }
  const ModelSpec& spec() const { return spec_; }
  const StoreLayout& layout() const { return layout_; }
  const UnitHash& hash(const StoredUnit& unit) const;
  /// Whom the store was made from, for messages: a folder or a repository's name.
  const std::string& source() const { return source_; }
  /// SHA-256 that tells models of one shape apart; see fingerprint() in pack.h.
  const std::string& fingerprint() const { return fingerprint_; }
  /// The 16 bytes every unit header of this store carries.
  const std::array<std::byte, 16>& mark() const { return mark_; }
  fs::path path_of(const StoredUnit& unit) const;
  /// "layers/00003.tiles, offset 4096: layer 3, expert 17".
  std::string where(const StoredUnit& unit) const;
  /// Throws Error{bad_file} unless `bytes` begin with the header this unit should have.
  void check_header(const StoredUnit& unit, const std::byte* bytes) const;
  /// Throws Error{bad_file} unless `bytes` have the unit's hash.
  void check_hash(const StoredUnit& unit, const std::byte* bytes) const;

 private:
  fs::path folder_;
  ModelSpec spec_;
  StoreLayout layout_;
  std::vector<UnitHash> hashes_;  ///< as layout_.units
  std::string source_, fingerprint_;
  std::array<std::byte, 16> mark_{};
};

/// What store.json holds.
struct StoreManifest {
  StoreLayout layout;
  std::vector<UnitHash> hashes;
  std::string source, fingerprint;
  std::array<std::byte, 16> mark{};
};
Json manifest_json(const StoreManifest& manifest);
/// Throws Error{bad_file}.
StoreManifest read_manifest(const Json& json, const std::string& where);

/// The mark of a store's unit headers: a digest of the layout and of config.json.
std::array<std::byte, 16> store_mark(const StoreLayout& layout, std::string_view config);

constexpr const char* kManifestName = "store.json";
constexpr const char* kJournalName = "pack.journal";

}  // namespace tailor
