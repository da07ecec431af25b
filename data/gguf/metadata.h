#pragma once

#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "data/checkpoint/model_spec.h"
#include "data/gguf/header.h"

namespace tailor {

/// A GGUF file's values by key, with their types checked. The errors name the file and the key.
class GgufValues {
 public:
  GgufValues(const GgufHeader& header, std::string where)
      : header_(header), where_(std::move(where)) {}

  bool has(std::string_view key) const;
  std::int64_t integer(const std::string& key) const;
  std::int64_t integer(const std::string& key, std::int64_t fallback) const;
  double number(const std::string& key) const;
  double number(const std::string& key, double fallback) const;
  bool boolean(const std::string& key, bool fallback) const;
  std::string text(const std::string& key) const;
  std::string text(const std::string& key, const std::string& fallback) const;
  const std::vector<std::string>& texts(const std::string& key) const;
  const std::vector<std::int64_t>& integers(const std::string& key) const;
  const GgufHeader& header() const { return header_; }
  const std::string& where() const { return where_; }
  [[noreturn]] void refuse(const std::string& key, const std::string& what,
                           const std::string& mend) const;

 private:
  template <class T>
  const T& get(const std::string& key, const char* needed) const;
  const GgufHeader& header_;
  std::string where_;
};

/// The name by which llama.cpp knows a family: "llama", "qwen2", "llama4", "deepseek2".
const char* gguf_architecture(Family family);

/// The values that describe a model's shape, general.architecture first. `file_type` is llama.cpp's
/// number for the weights' type (llama.h, enum llama_ftype), `name` for people.
///
/// Throws Error{usage}, naming the option, for every model that llama.cpp (as of llama-cpp-python
/// 0.3.36, src/models) would compute as another function or not load at all.
std::vector<std::pair<std::string, GgufValue>> gguf_model_values(const ModelSpec& spec,
                                                                 const std::string& name,
                                                                 std::int64_t file_type);

/// config.json of the model in a GGUF file, as transformers would write it; `frequency_factors` are
/// the numbers of rope_freqs.weight, if there is one. Throws Error{bad_file}: an architecture that
/// is not one of the four, keys missing or of another type, and options that Tailor does not
/// implement.
Json config_from_gguf(const GgufValues& values, std::vector<float> frequency_factors);

}  // namespace tailor
