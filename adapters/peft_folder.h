#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>

#include "adapters/peft_config.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {

/// The two factors of one module of an adapter file, by where they lie in it: matrices [rows,
/// columns] in F32, BF16 or F16.
struct StoredPair {
  TensorInfo a, b;
};
inline std::int64_t rows_of(const TensorInfo& factor) { return factor.shape[0]; }
inline std::int64_t columns_of(const TensorInfo& factor) { return factor.shape[1]; }

/// An adapter's folder with its tensors as they are stored. Opening reads the config and the
/// header; factors are mapped, and read when asked for. Reading may be done by several threads.
class PeftFolder {
 public:
  /// Throws Error{bad_file}: files missing or cut off, a config as read_peft_config(), tensors that
  /// are no LoRA factors, an A without its B, shapes that are no matrices, an empty file.
  explicit PeftFolder(const fs::path& folder);

  const PeftConfig& config() const noexcept { return config_; }
  const fs::path& file_path() const noexcept { return file_.path(); }
  /// By module, without "base_model.model." and the multimodal wrapper's "language_model.".
  const std::map<std::string, StoredPair>& pairs() const noexcept { return pairs_; }
  const StoredPair* find(const std::string& module) const;
  std::int64_t file_bytes() const noexcept {
    return static_cast<std::int64_t>(file_.bytes().size());
  }
  std::set<std::string> dtypes() const;
  /// Of the base the factors were trained on, as fingerprint() gives it; empty: not recorded.
  std::string base_fingerprint() const;

  /// Rows [first, first + count) as floats. Here and below, pages that were read are let go.
  void rows(const TensorInfo& factor, std::int64_t first, std::int64_t count, float* out) const;
  /// out[e - first][r][i] = factor[i][r * experts + e], for experts [first, first + count).
  void unfold(const TensorInfo& factor, std::int64_t rank, std::int64_t experts, std::int64_t first,
              std::int64_t count, float* out) const;
  /// Whether two factors have the same shape and bytes.
  bool same_values(const TensorInfo& x, const TensorInfo& y) const;
  /// Reads all factors once and throws Error{bad_file} naming the first that is infinite or no
  /// number.
  void check_finite() const;

 private:
  const std::byte* bytes_of(const TensorInfo& factor) const;
  void drop(const TensorInfo& factor, std::int64_t offset, std::int64_t bytes) const;

  PeftConfig config_;
  MappedFile file_;
  std::map<std::string, StoredPair> pairs_;
  std::map<std::string, std::string> metadata_;
};

/// What the names of an adapter file's tensors begin with.
inline constexpr std::string_view kPeftKeyPrefix = "base_model.model.";
/// In the safetensors metadata: fingerprint() of the base that the factors were trained on.
inline constexpr const char* kBaseFingerprintKey = "base_fingerprint";

}  // namespace tailor
