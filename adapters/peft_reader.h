#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "adapters/lora.h"
#include "adapters/peft_files.h"
#include "adapters/peft_folder.h"
#include "base/file.h"
#include "base/json.h"

namespace tailor {

/// The factors of one matrix for each of its experts: A [experts, rank, in], B [experts, rank,
/// out].
struct LoadedFactors {
  std::vector<float> a, b;
};

/// A PEFT adapter folder that is open: what it adapts is known from its config and its header, and
/// factors are read when they are asked for, so that an adapter may be larger than memory.
class PeftReader {
 public:
  /// Throws as read_peft_adapter, but for numbers that are none: see check_finite().
  PeftReader(const fs::path& folder, const ModelSpec& spec);
  PeftReader(const PeftReader&) = delete;
  PeftReader& operator=(const PeftReader&) = delete;

  /// With rank, scale and alpha; every expert has factors. By layer and projection; offsets are not
  /// set.
  std::span<const LoraSite> sites() const noexcept { return sites_; }
  const LoraOptions& options() const noexcept { return options_; }
  const PeftFolder& folder() const noexcept { return folder_; }
  const Json& config() const noexcept { return config_.json; }
  const fs::path& weights_path() const noexcept { return folder_.file_path(); }
  const fs::path& config_path() const noexcept { return config_.path; }

  /// Factors of experts [first, first + count) of a site of sites(), as the arena keeps them:
  /// a [count, rank, in], b [count, rank, out]. Pages of the file that were read are let go. May be
  /// called by several threads.
  void read(const LoraSite& site, std::int64_t first, std::int64_t count, float* a, float* b) const;
  /// Those of all its experts.
  LoadedFactors read(const LoraSite& site) const;

  /// Reads all factors once and throws Error{bad_file} naming the first that is infinite or no
  /// number.
  void check_finite() const { folder_.check_finite(); }

 private:
  enum class Form { plain, straight, swapped, each_down, each_gate_up_shared, each_gate_up_apart };

  [[noreturn]] void refuse(const std::string& what, const std::string& name,
                           const std::string& mend) const;
  const StoredPair* find(const std::string& module);
  void need_shape(const TensorInfo& factor, std::int64_t rows, std::int64_t columns,
                  const std::string& name) const;
  /// The config's rank decides the scale, so it must be that of the factors.
  void need_rank(std::int64_t rank, const std::string& module) const;
  bool find_plain(LoraSite& site);
  bool find_experts(LoraSite& site);
  void find_fused(const StoredPair& pair, const std::string& key, LoraSite& site);
  void find_each_down(LoraSite& site);
  void find_each_gate_up(LoraSite& site);
  std::string fused_key(const std::string& module, bool gate_up) const;
  const StoredPair& expert_pair(const LoraSite& site, std::int64_t expert, const char* projection,
                                std::int64_t in, std::int64_t out);
  void refuse_left_over() const;

  const ModelSpec& spec_;
  PeftFolder folder_;
  const PeftConfig& config_;
  std::set<std::string> used_;
  LoraOptions options_;
  std::vector<LoraSite> sites_;
  /// Of each site by (layer, projection): its form and the module its factors are named by.
  std::map<std::pair<int, Projection>, std::pair<Form, std::string>> forms_;
};

}  // namespace tailor
