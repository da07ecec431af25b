#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/file.h"
#include "data/text/conversation.h"
#include "data/tokens/token_store.h"

namespace tailor {

/// Tokenised documents on their way into a store. Tokens go to two scratch files, because data may
/// be larger than memory; only 40 bytes a document stay here. The files go away with it.
class DocumentSpill {
 public:
  /// `folder` is made, and removed in the end.
  explicit DocumentSpill(fs::path folder);
  ~DocumentSpill();
  DocumentSpill(const DocumentSpill&) = delete;
  DocumentSpill& operator=(const DocumentSpill&) = delete;

  struct Entry {
    std::int64_t begin = 0, size = 0;
    std::int32_t file = 0, copies = 1;
    std::int64_t line = 0;
    std::uint64_t hash = 0;  ///< of ids and mask
  };
  void add(std::span<const std::int32_t> ids, std::span<const std::uint8_t> trained,
           std::int32_t file, std::int64_t line, double weight);
  /// No more adds; documents can be read.
  void seal();
  const std::vector<Entry>& entries() const { return entries_; }
  TokenStoreContent::Document document(const Entry& entry) const;

 private:
  fs::path folder_;
  std::unique_ptr<FileWriter> ids_, trained_;
  std::optional<MappedFile> ids_map_, trained_map_;
  std::vector<Entry> entries_;
  std::int64_t tokens_ = 0;
};

/// A number in [0, 1) of a content hash; `salt` makes independent ones.
double hash_unit(std::uint64_t hash, std::uint64_t salt);

}  // namespace tailor
