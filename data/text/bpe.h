#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"

namespace tailor {

/// Pairs of ids that merge, by open addressing: one cache line a look-up, 440,000 merges in 14 MB.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t rank = 0;
    std::int32_t id = 0;  ///< of the merged token
  };
  void reserve(std::size_t count);
  void set(std::int32_t left, std::int32_t right, Merge merge);
  const Merge* find(std::int32_t left, std::int32_t right) const;

 private:
  struct Slot {
    std::uint64_t key = kEmpty;
    Merge merge;
  };
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  std::size_t slot_of(std::uint64_t key) const;
  std::vector<Slot> slots_;
};

/// The byte-level BPE model of a tokenizer.json ("model": {"type": "BPE"}).
///
/// A word starts as its bytes; the pair with the lowest rank (leftmost on a tie) merges until none
/// is left. Immutable after construction.
class BytePairModel {
 public:
  /// `model` is the "model" object; `where` names the file. Throws Error{bad_file} for every part
  /// that is not understood.
  BytePairModel(const nlohmann::json& model, const std::string& where);

  /// Appends the ids of one pre-tokenised word.
  void encode(std::string_view word, std::vector<std::int32_t>& out) const;

  /// Tokens by name as the file writes them (byte alphabet), and names by id ("" for a gap).
  const std::unordered_map<std::string, std::int32_t>& ids() const { return ids_; }
  std::int32_t size() const { return size_; }  ///< one more than the largest id

 private:
  void merge(std::string_view word, std::vector<std::int32_t>& out) const;

  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const noexcept {
      return std::hash<std::string_view>{}(text);
    }
  };
  std::unordered_map<std::string, std::int32_t> ids_;
  /// Whole words, as bytes; filled only where ignore_merges looks words up.
  std::unordered_map<std::string, std::int32_t, Hash, std::equal_to<>> words_;
  MergeTable merges_;
  std::array<std::int32_t, 256> byte_id_{};  ///< -1: the vocabulary has no such byte
  std::int32_t size_ = 0;
  std::uint64_t serial_ = 0;  ///< names this model in the threads' word caches
};

}  // namespace tailor
