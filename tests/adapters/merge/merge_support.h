#pragma once

#include <unistd.h>

#include <bit>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "adapters/lora.h"
#include "adapters/merge/merge.h"
#include "adapters/peft_files.h"
#include "base/error.h"
#include "base/file.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"
#include "data/quant/numbers.h"

namespace tailor::testing_support {

inline fs::path golden(const std::string& name) {
  return fs::path(TAILOR_SOURCE_DIR) / "tests/golden" / name;
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (fs::temp_directory_path() / "tailor-merge-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code error;
    fs::remove_all(path_, error);
  }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

struct Stored {
  Dtype dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;
  std::vector<float> floats() const {
    std::vector<float> out;
    const std::size_t width = static_cast<std::size_t>(dtype_bytes(dtype));
    for (std::size_t i = 0; i < bytes.size(); i += width) {
      if (dtype == Dtype::f32) {
        float value = 0;
        std::memcpy(&value, bytes.data() + i, sizeof value);
        out.push_back(value);
      } else {
        std::uint16_t bits = 0;
        std::memcpy(&bits, bytes.data() + i, sizeof bits);
        out.push_back(bf16_to_float(bits));
      }
    }
    return out;
  }
};

/// Every tensor in the safetensors files of a folder, by its name there.
inline std::map<std::string, Stored> load_folder(const fs::path& folder) {
  std::map<std::string, Stored> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".safetensors") continue;
    const MappedFile file(entry.path());
    for (const auto& [name, info] : parse_safetensors_header(file.bytes(), entry.path()).tensors) {
      const auto bytes = file.bytes().subspan(static_cast<std::size_t>(info.offset),
                                              static_cast<std::size_t>(info.bytes));
      out[name] = {info.dtype, info.shape, {bytes.begin(), bytes.end()}};
    }
  }
  return out;
}

/// All regular files of a folder and their bytes, but for the receipt, which has seconds in it.
inline std::map<std::string, std::string> merged_files(const fs::path& folder) {
  std::map<std::string, std::string> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    if (name != "merge_receipt.json") out[name] = read_text(entry.path());
  }
  return out;
}

inline MergeOptions one_adapter(const fs::path& adapter, MergeDtype dtype = MergeDtype::as_base) {
  MergeOptions options;
  options.adapters = {{adapter, 1}};
  options.dtype = dtype;
  return options;
}

/// A PEFT folder with random factors on `targets` of a model; B is drawn too.
inline void make_adapter(const fs::path& folder, const ModelSpec& spec,
                         const std::vector<std::string>& targets, double b_size = 0.05,
                         std::uint64_t seed = 1, const ChosenByLayer& chosen = {},
                         const std::string& base_fingerprint = {}) {
  LoraOptions options;
  options.targets = targets;
  options.rank = options.expert_rank = 4;
  options.chosen_experts = chosen;
  Adapter adapter = Adapter::create(spec, options, seed);
  std::uint64_t state = seed * 7919 + 1;
  for (const LoraSite& site : adapter.sites()) {
    for (float& value : adapter.b_of(site)) {
      state = state * 6364136223846793005U + 1442695040888963407U;
      value = static_cast<float>((static_cast<double>(state >> 11U) * 0x1p-53 - 0.5) * 2 * b_size);
    }
  }
  write_peft_adapter(folder, adapter, spec, {"base", "", base_fingerprint});
}

}  // namespace tailor::testing_support
