#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace tailor {

/// Tokenised rows on disk: an HDF5 file and a manifest (docs/formats/token_store.md).
///
/// HDF5 files are written whole and renamed into place, because one that is being appended to does
/// not survive kill -9; and they are opened only after their SHA-256 agrees with the manifest,
/// because the library crashes on hostile files. The data is then read through a memory map.
/// Immutable; many threads may read.
class TokenStore {
 public:
  /// Throws Error{bad_file} when the manifest is missing, of another version, or does not match.
  static TokenStore open(const fs::path& path);
  static fs::path manifest_path(const fs::path& path);

  std::int64_t rows() const { return static_cast<std::int64_t>(row_start_.size()) - 1; }
  std::int64_t documents() const { return static_cast<std::int64_t>(document_start_.size()) - 1; }
  std::int64_t tokens() const { return static_cast<std::int64_t>(ids_.size()); }
  std::int64_t trained_tokens() const { return trained_tokens_; }
  std::int64_t sequence_len() const { return sequence_len_; }

  std::span<const std::int32_t> ids() const { return ids_; }              ///< [N]
  std::span<const std::uint8_t> trained() const { return trained_; }      ///< [N], 0 or 1
  std::span<const std::int64_t> row_start() const { return row_start_; }  ///< [rows + 1]
  /// [documents + 1] offsets into ids; every row border is one of them.
  std::span<const std::int64_t> document_start() const { return document_start_; }
  /// [documents] where a document came from: index into manifest "files", and its line.
  std::span<const std::int32_t> document_file() const { return document_file_; }
  std::span<const std::int64_t> document_line() const { return document_line_; }

  const Json& manifest() const { return manifest_; }
  const fs::path& path() const { return file_.path(); }

 private:
  TokenStore(MappedFile file, Json manifest)
      : file_(std::move(file)), manifest_(std::move(manifest)) {}

  MappedFile file_;
  Json manifest_;
  std::vector<std::vector<std::byte>> copies_;  ///< of columns that cannot be read in place
  std::span<const std::int32_t> ids_, document_file_;
  std::span<const std::uint8_t> trained_;
  std::span<const std::int64_t> row_start_, document_start_, document_line_;
  std::int64_t trained_tokens_ = 0, sequence_len_ = 0;
};

/// What write_token_store is given: offsets, and a way to get a document's tokens.
struct TokenStoreContent {
  struct Document {
    std::span<const std::int32_t> ids;
    std::span<const std::uint8_t> trained;
    std::int32_t file = 0;
    std::int64_t line = 0;
  };
  /// Rows as lists of document numbers, in order.
  std::vector<std::vector<std::int64_t>> rows;
  std::function<Document(std::int64_t document)> document;
  std::int64_t sequence_len = 0;
  Json manifest;  ///< facts about the data; "format", "version", "sha256", counts are added
};

/// Writes store and manifest; an older store at `path` is replaced. The first token of a document
/// is stored as not trained: nothing of its document stands before it. Throws Error{io} or
/// Error{does_not_fit}; then the older store is still whole.
void write_token_store(const fs::path& path, const TokenStoreContent& content);

}  // namespace tailor
