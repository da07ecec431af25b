#include "data/text/bpe.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "data/text/unicode.h"

namespace tailor {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(
      Fault::bad_file,
      {what, where,
       "Tailor reads byte-level BPE tokenizers exactly as Hugging Face's tokenizers does, and "
       "refuses what it would read differently. Use the tokenizer.json the model was "
       "published with."});
}

/// Words and their ids, per thread, so that encode() needs no lock. It is emptied when full: a
/// least-recently-used order would cost more than it saves.
struct WordCache {
  static constexpr std::size_t kWordsMax = 100'000;
  static constexpr std::size_t kWordBytesMax = 64;
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const noexcept {
      return std::hash<std::string_view>{}(text);
    }
  };
  std::uint64_t serial = 0;
  std::unordered_map<std::string, std::vector<std::int32_t>, Hash, std::equal_to<>> words;
};

std::uint64_t next_serial() {
  static std::atomic<std::uint64_t> serial{0};
  return ++serial;
}

bool is_null_or_empty(const nlohmann::json& value) {
  return value.is_null() || (value.is_string() && value.get_ref<const std::string&>().empty());
}

}  // namespace

std::size_t MergeTable::slot_of(std::uint64_t key) const {
  std::uint64_t hash = key * 0x9E3779B97F4A7C15ULL;
  hash ^= hash >> 32U;
  std::size_t slot = static_cast<std::size_t>(hash) & (slots_.size() - 1);
  while (slots_[slot].key != kEmpty && slots_[slot].key != key) {
    slot = (slot + 1) & (slots_.size() - 1);
  }
  return slot;
}

void MergeTable::reserve(std::size_t count) {
  std::size_t size = 16;
  while (size < count * 2) size *= 2;
  slots_.assign(size, Slot{});
}

void MergeTable::set(std::int32_t left, std::int32_t right, Merge merge) {
  const std::uint64_t key =
      (std::uint64_t{static_cast<std::uint32_t>(left)} << 32U) | static_cast<std::uint32_t>(right);
  slots_[slot_of(key)] = {key, merge};
}

const MergeTable::Merge* MergeTable::find(std::int32_t left, std::int32_t right) const {
  const std::uint64_t key =
      (std::uint64_t{static_cast<std::uint32_t>(left)} << 32U) | static_cast<std::uint32_t>(right);
  const Slot& slot = slots_[slot_of(key)];
  return slot.key == key ? &slot.merge : nullptr;
}

BytePairModel::BytePairModel(const nlohmann::json& model, const std::string& where)
    : serial_(next_serial()) {
  const std::string place = where + " (model)";
  if (!model.is_object()) refuse("'model' must be an object", place);
  const std::string type = model.contains("type") && model["type"].is_string()
                               ? model["type"].get<std::string>()
                               : std::string("BPE");
  if (type != "BPE") {
    refuse("tokenizer model '" + type + "' is not supported, only byte-level BPE is", place);
  }
  bool ignore_merges = false;
  bool unknown_matters = false;
  for (const auto& [key, value] : model.items()) {
    if (key == "type" || key == "vocab" || key == "merges") continue;
    if (key == "dropout") {
      if (!value.is_null() && !(value.is_number() && value.get<double>() == 0.0)) {
        refuse("merge dropout would make tokens random", place + " dropout");
      }
    } else if (key == "continuing_subword_prefix" || key == "end_of_word_suffix") {
      if (!is_null_or_empty(value)) refuse("'" + key + "' is not supported", place + " " + key);
    } else if (key == "unk_token") {
      unknown_matters = unknown_matters || !value.is_null();
    } else if (key == "byte_fallback") {
      if (!value.is_boolean()) refuse("'byte_fallback' must be true or false", place);
      unknown_matters = unknown_matters || value.get<bool>();
    } else if (key == "fuse_unk") {
      if (!value.is_boolean()) refuse("'fuse_unk' must be true or false", place);
    } else if (key == "ignore_merges") {
      if (!value.is_boolean()) refuse("'ignore_merges' must be true or false", place);
      ignore_merges = value.get<bool>();
    } else {
      refuse("unknown key '" + key + "'", place);
    }
  }

  if (!model.contains("vocab") || !model["vocab"].is_object()) {
    refuse("'vocab' must be an object of token names and ids", place);
  }
  byte_id_.fill(-1);
  ids_.reserve(model["vocab"].size());
  for (const auto& [name, value] : model["vocab"].items()) {
    if (!value.is_number_integer() || value < 0 ||
        value > std::numeric_limits<std::int32_t>::max() - 1) {
      refuse("the id of token '" + name + "' must be an integer from 0 to 2147483646",
             place + " vocab");
    }
    const auto id = value.get<std::int32_t>();
    ids_.emplace(name, id);
    size_ = std::max(size_, id + 1);
    if (!in_byte_alphabet(name)) continue;
    std::string bytes = from_byte_alphabet(name);
    if (bytes.size() == 1) byte_id_[static_cast<unsigned char>(bytes[0])] = id;
    if (ignore_merges) words_.emplace(std::move(bytes), id);
  }
  // A vocabulary may hold several names for one id; that cannot be decoded.
  std::vector<bool> seen(static_cast<std::size_t>(size_));
  if (size_ > 0 && ids_.size() * 64 < static_cast<std::size_t>(size_)) {
    refuse("the largest id " + std::to_string(size_ - 1) + " is far above the " +
               std::to_string(ids_.size()) + " tokens there are",
           place + " vocab");
  }
  for (const auto& [name, id] : ids_) {
    if (seen[static_cast<std::size_t>(id)]) {
      refuse("id " + std::to_string(id) + " has two names, one is '" + name + "'",
             place + " vocab");
    }
    seen[static_cast<std::size_t>(id)] = true;
  }
  // Without an unknown token Hugging Face leaves a byte out that the vocabulary lacks, and so do
  // we. With one, it would be used: only files where that can never happen are read. The bytes C0,
  // C1 and F5..FF do not occur in UTF-8.
  for (int byte = 0; byte < 256 && unknown_matters; ++byte) {
    const bool occurs = byte != 0xC0 && byte != 0xC1 && byte < 0xF5;
    if (occurs && byte_id_[static_cast<std::size_t>(byte)] < 0) {
      refuse("the vocabulary has no token for byte " + std::to_string(byte) +
                 ": unk_token and byte_fallback are not supported",
             place);
    }
  }

  if (!model.contains("merges") || !model["merges"].is_array()) {
    refuse("'merges' must be a list", place);
  }
  merges_.reserve(model["merges"].size());
  std::uint32_t rank = 0;
  for (const nlohmann::json& entry : model["merges"]) {
    const std::string at = place + " merges[" + std::to_string(rank) + "]";
    std::string left, right;
    if (entry.is_string()) {
      const auto& text = entry.get_ref<const std::string&>();
      const std::size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        refuse("a merge must be two token names with one space between them", at);
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
               entry[1].is_string()) {
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    } else {
      refuse("a merge must be 'left right' or [left, right]", at);
    }
    const auto l = ids_.find(left);
    const auto r = ids_.find(right);
    const auto merged = ids_.find(left + right);
    if (l == ids_.end() || r == ids_.end() || merged == ids_.end()) {
      refuse("the merge of '" + left + "' and '" + right + "' names a token the vocabulary lacks",
             at);
    }
    merges_.set(l->second, r->second, {rank, merged->second});
    ++rank;
  }
}

void BytePairModel::encode(std::string_view word, std::vector<std::int32_t>& out) const {
  if (!words_.empty()) {
    if (const auto whole = words_.find(word); whole != words_.end()) {
      out.push_back(whole->second);
      return;
    }
  }
  if (word.size() > WordCache::kWordBytesMax) {
    merge(word, out);
    return;
  }
  thread_local WordCache cache;
  if (cache.serial != serial_ || cache.words.size() >= WordCache::kWordsMax) {
    cache.words.clear();
    cache.serial = serial_;
  }
  if (const auto known = cache.words.find(word); known != cache.words.end()) {
    out.insert(out.end(), known->second.begin(), known->second.end());
    return;
  }
  const std::size_t begin = out.size();
  merge(word, out);
  cache.words.emplace(
      std::string(word),
      std::vector<std::int32_t>(out.begin() + static_cast<std::ptrdiff_t>(begin), out.end()));
}

void BytePairModel::merge(std::string_view word, std::vector<std::int32_t>& out) const {
  // Symbols form a linked list; a heap holds the merges that may still happen. An entry is stale
  // when the pair at its place no longer makes the token it promised.
  struct Symbol {
    std::int32_t id, previous, next;
  };
  struct Candidate {
    std::uint32_t rank;
    std::int32_t at, id;
    bool operator<(const Candidate& other) const {  // for a heap whose top is the smallest
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  thread_local std::vector<Symbol> symbols;
  thread_local std::vector<Candidate> heap;
  symbols.clear();
  heap.clear();
  for (const char c : word) {
    const std::int32_t id = byte_id_[static_cast<unsigned char>(c)];
    if (id < 0) continue;
    const auto at = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({id, at - 1, at + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  const auto symbol = [&](std::int32_t at) -> Symbol& {
    return symbols[static_cast<std::size_t>(at)];
  };
  const auto consider = [&](std::int32_t at) {
    const std::int32_t next = symbol(at).next;
    if (next < 0) return;
    if (const auto* found = merges_.find(symbol(at).id, symbol(next).id)) {
      heap.push_back({found->rank, at, found->id});
      std::push_heap(heap.begin(), heap.end());
    }
  };
  for (std::int32_t at = 0; symbol(at).next >= 0; ++at) consider(at);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate top = heap.back();
    heap.pop_back();
    Symbol& left = symbol(top.at);
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbol(left.next);
    const auto* now = merges_.find(left.id, right.id);
    if (now == nullptr || now->id != top.id) continue;
    left.id = top.id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbol(left.next).previous = top.at;
    if (left.previous >= 0) consider(left.previous);
    consider(top.at);
  }
  for (std::int32_t at = 0; at >= 0; at = symbol(at).next) out.push_back(symbol(at).id);
}

}  // namespace tailor
