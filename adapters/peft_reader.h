#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "adapters/lora.h"
#include "adapters/peft_files.h"
#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/dtype.h"

namespace tailor {

/// A PEFT adapter folder that is open: what it adapts is known from its config and its header, and
/// factors are read when they are asked for, so that an adapter may be larger than memory.
class PeftReader {
 public:
  /// Throws as read_peft_adapter, but for numbers that are none: see check_finite().
  PeftReader(const fs::path& folder, const ModelSpec& spec);

  /// With rank, scale and alpha; every expert has factors. By layer and projection; offsets are not
  /// set.
  std::span<const LoraSite> sites() const noexcept { return sites_; }
  const LoraOptions& options() const noexcept { return options_; }
  const Json& config() const noexcept { return config_; }
  const fs::path& weights_path() const noexcept { return file_path_; }
  const fs::path& config_path() const noexcept { return config_path_; }

  /// Factors of experts [first, first + count) of a site of sites(), as the arena keeps them:
  /// a [count, rank, in], b [count, rank, out]. Pages of the file that were read are let go. May be
  /// called by several threads.
  void read(const LoraSite& site, std::int64_t first, std::int64_t count, float* a, float* b) const;

  /// Reads all factors once and throws Error{bad_file} naming the first that is infinite or no
  /// number.
  void check_finite() const;

 private:
  /// One factor of the file, row-major [rows, columns].
  struct Factor {
    std::int64_t rows = 0, columns = 0;
    Dtype dtype = Dtype::f32;
    std::int64_t offset = 0;  ///< in the file
    std::int64_t bytes() const;
  };
  struct FactorPair {
    std::optional<Factor> a, b;
  };
  enum class Form { plain, straight, swapped, each_down, each_gate_up_shared, each_gate_up_apart };

  [[noreturn]] static void refuse(const std::string& what, const std::string& where,
                                  const std::string& mend);
  void read_config();
  void read_header();
  double alpha_of(const std::string& module) const;
  const FactorPair* find(const std::string& module);
  void need_shape(const Factor& factor, std::int64_t rows, std::int64_t columns,
                  const std::string& name) const;
  bool find_plain(LoraSite& site);
  bool find_experts(LoraSite& site);
  void find_fused(const FactorPair& pair, const std::string& key, LoraSite& site);
  void find_each_down(LoraSite& site);
  void find_each_gate_up(LoraSite& site);
  std::string fused_key(const std::string& module, bool gate_up) const;
  const FactorPair& expert_pair(const LoraSite& site, std::int64_t expert, const char* projection,
                                std::int64_t in, std::int64_t out);
  void refuse_left_over() const;

  const std::byte* bytes_of(const Factor& factor) const;
  void drop(const Factor& factor, std::int64_t offset, std::int64_t bytes) const;
  bool same_values(const Factor& x, const Factor& y) const;
  /// Rows [first, first + count) as floats.
  void rows(const Factor& factor, std::int64_t first, std::int64_t count, float* out) const;
  /// out[e - first][r][i] = factor[i][r * experts + e], for experts [first, first + count).
  void unfold(const Factor& factor, std::int64_t rank, std::int64_t experts, std::int64_t first,
              std::int64_t count, float* out) const;

  const ModelSpec& spec_;
  fs::path file_path_, config_path_;
  std::optional<MappedFile> file_;
  Json config_;
  std::int64_t rank_ = 8;
  double alpha_ = 16;
  bool rslora_ = false;
  std::string version_;
  std::vector<std::pair<std::string, double>> alpha_pattern_;
  std::map<std::string, FactorPair> pairs_;
  std::set<std::string> used_;
  LoraOptions options_;
  std::vector<LoraSite> sites_;
  /// Of each site by (layer, projection): its form and the module its factors are named by.
  std::map<std::pair<int, Projection>, std::pair<Form, std::string>> forms_;
};

}  // namespace tailor
