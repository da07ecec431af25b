#include "data/tokens/document_spill.h"

#include <xxhash.h>

#include <cmath>
#include <system_error>

#include "base/error.h"
#include "base/random.h"

namespace tailor {

double hash_unit(std::uint64_t hash, std::uint64_t salt) {
  return random_unit(hash, RandomStream::sample, salt);
}

DocumentSpill::DocumentSpill(fs::path folder) : folder_(std::move(folder)) {
  make_folders(folder_);
  ids_ = std::make_unique<FileWriter>(folder_ / "ids");
  trained_ = std::make_unique<FileWriter>(folder_ / "trained");
}

DocumentSpill::~DocumentSpill() {
  ids_.reset();
  trained_.reset();
  std::error_code ignored;  // scratch: what is left over harms nobody
  fs::remove_all(folder_, ignored);
}

void DocumentSpill::add(std::span<const std::int32_t> ids, std::span<const std::uint8_t> trained,
                        std::int32_t file, std::int64_t line, double weight) {
  TAILOR_CHECK(!ids.empty() && ids.size() == trained.size());
  const std::uint64_t first = XXH3_64bits(ids.data(), ids.size_bytes());
  const std::uint64_t hash = XXH3_64bits_withSeed(trained.data(), trained.size_bytes(), first);
  const double whole = std::floor(weight);
  const bool one_more = hash_unit(hash, 1) < weight - whole;
  const auto copies = static_cast<std::int32_t>(whole) + (one_more ? 1 : 0);
  const auto size = static_cast<std::int64_t>(ids.size());
  entries_.push_back({tokens_, size, file, copies, line, hash});
  if (copies == 0) {
    entries_.back().size = 0;
    return;
  }
  ids_->write(std::as_bytes(ids));
  trained_->write(std::as_bytes(trained));
  tokens_ += size;
}

void DocumentSpill::seal() {
  ids_->flush();
  trained_->flush();
  ids_map_.emplace(folder_ / "ids");
  trained_map_.emplace(folder_ / "trained");
}

TokenStoreContent::Document DocumentSpill::document(const Entry& entry) const {
  const auto begin = static_cast<std::size_t>(entry.begin);
  const auto size = static_cast<std::size_t>(entry.size);
  const auto* ids = reinterpret_cast<const std::int32_t*>(ids_map_->bytes().data());
  const auto* trained = reinterpret_cast<const std::uint8_t*>(trained_map_->bytes().data());
  return {{ids + begin, size}, {trained + begin, size}, entry.file, entry.line};
}

}  // namespace tailor
