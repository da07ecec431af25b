#pragma once

#include <cstdint>
#include <optional>
#include <regex>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace tailor {

/// An option of our own: "vllm" where rows of q and k are not the adapter's but vLLM's
/// (serving.cpp). No program but Tailor looks at it.
constexpr const char* kVllmRowsKey = "tailor_qk_rows";

/// Values for modules whose names match, as rank_pattern and alpha_pattern hold them.
class PeftPatterns {
 public:
  /// Throws Error{bad_file} for a pattern that is no regular expression; `key` names the list.
  void add(const std::string& key, const std::string& pattern, double value, const fs::path& path);
  /// PEFT's get_pattern_key: the value of the first pattern that matches the end of the module's
  /// name, or of its weight's where PEFT was told of the parameter.
  std::optional<double> find(const std::string& module) const;

 private:
  struct Entry {
    std::string pattern;
    double value = 0;
    std::optional<std::regex> expression;  ///< none: a plain name, as nearly all are
  };
  static bool matches(const Entry& entry, const std::string& name);
  std::vector<Entry> entries_;
};

/// adapter_config.json of a LoRA adapter, as PEFT reads it (peft/tuners/lora/config.py).
struct PeftConfig {
  std::int64_t rank = 8;
  double alpha = 8;
  bool rslora = false;
  std::string version;     ///< of the PEFT that wrote it; empty: not said
  std::string base_model;  ///< base_model_name_or_path; empty: not said
  /// Names, or one expression where PEFT was given one.
  std::vector<std::string> target_modules, target_parameters;
  PeftPatterns rank_pattern, alpha_pattern;
  fs::path path;
  Json json;  ///< the whole file

  std::int64_t rank_of(const std::string& module) const;
  double alpha_of(const std::string& module) const;
  double scale(double alpha, std::int64_t rank) const;
};

/// Reads it. Throws Error{bad_file} for what is missing or of another type, for options that change
/// the maths (DoRA, biases, PiSSA's starts and the like), and for options that are set and that
/// Tailor does not know, each by name.
PeftConfig read_peft_config(const fs::path& folder);

}  // namespace tailor
