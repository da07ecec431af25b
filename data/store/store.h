#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/model_spec.h"
#include "data/store/layout.h"
#include "data/store/source_forms.h"

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
  /// one, another version, files that are missing or of another length, a manifest that contradicts
  /// itself or config.json, or is not, to the byte, as it was written.
  static Store open(const fs::path& folder);

  const fs::path& folder() const { return folder_; }
  const ModelSpec& spec() const { return spec_; }
  const StoreLayout& layout() const { return layout_; }
  const UnitHash& hash(const StoredUnit& unit) const;
  /// Whom the store was made from, for messages: a folder or a repository's name.
  const std::string& source() const { return source_; }
  /// Of the checkpoint's tensor names: "" or "language_model.".
  const std::string& prefix() const { return prefix_; }
  /// SHA-256 that tells models of one shape apart; see fingerprint.h.
  const std::string& fingerprint() const { return fingerprint_; }
  /// What the checkpoint's matrices were published as; nothing for a store that was not packed from
  /// one.
  const std::optional<SourceForms>& forms() const { return forms_; }
  /// The 16 bytes every unit header of this store carries.
  const std::array<std::byte, 16>& mark() const { return mark_; }
  /// Of the routed experts' matrices, and of the others' (attention, MLPs); the former are the
  /// latter's in a model without experts.
  WeightFormat expert_format() const;
  WeightFormat other_format() const;
  fs::path path_of(const StoredUnit& unit) const;
  /// "layers/00003.tiles, offset 4096: layer 3, expert 17".
  std::string where(const StoredUnit& unit) const;
  /// Throws Error{bad_file} unless `bytes` begin with the header this unit should have, every bit
  /// of its 4,096 bytes.
  void check_header(const StoredUnit& unit, const std::byte* bytes) const;
  /// Throws Error{bad_file} unless `bytes` have the unit's hash.
  void check_hash(const StoredUnit& unit, const std::byte* bytes) const;

 private:
  fs::path folder_;
  ModelSpec spec_;
  StoreLayout layout_;
  std::vector<UnitHash> hashes_;  ///< as layout_.units
  std::string source_, fingerprint_, prefix_;
  std::optional<SourceForms> forms_;
  std::array<std::byte, 16> mark_{};
};

/// What store.json holds.
struct StoreManifest {
  StoreLayout layout;
  std::vector<UnitHash> hashes;
  std::string source, fingerprint;
  std::string prefix;                ///< of the checkpoint's names: "" or "language_model."
  std::optional<SourceForms> forms;  ///< of the checkpoint it was packed from
  std::array<std::byte, 16> mark{};
};
/// Its last member, `digest`, is of all others.
Json manifest_json(const StoreManifest& manifest);
/// The whole of store.json.
std::string manifest_text(const StoreManifest& manifest);
/// Throws Error{bad_file}.
StoreManifest read_manifest(const Json& json, const std::string& where);

/// 32 hexadecimal digits as 16 bytes; nothing for another text.
std::optional<std::array<std::byte, 16>> read_hex(const std::string& text);

/// The mark of a store's unit headers: a digest of the layout and of config.json.
std::array<std::byte, 16> store_mark(const StoreLayout& layout, std::string_view config);

constexpr const char* kManifestName = "store.json";
constexpr const char* kJournalName = "pack.journal";

}  // namespace tailor
