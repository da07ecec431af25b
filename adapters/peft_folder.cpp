#include "adapters/peft_folder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "data/store/halves.h"

namespace tailor {
namespace {

constexpr std::string_view kWrapper = "language_model.";
constexpr std::int64_t kStripBytes = std::int64_t{4} << 20;  ///< of the file, touched at once
constexpr std::string_view kSuffixA = ".lora_A.weight", kSuffixB = ".lora_B.weight";

[[noreturn]] void refuse(const std::string& what, const std::string& where,
                         const std::string& mend) {
  throw Error(Fault::bad_file, {what, where, mend});
}

fs::path factors_path(const fs::path& folder) {
  fs::path path = folder / "adapter_model.safetensors";
  std::error_code error;
  if (!fs::exists(path, error)) {
    refuse("adapter_model.safetensors is missing", folder.string(),
           "Tailor reads safetensors only. An adapter_model.bin is a pickle file, which can run "
           "code: convert it with PEFT's save_pretrained(safe_serialization=True).");
  }
  return path;
}

void check_factor(const TensorInfo& info, const std::string& where) {
  if (info.shape.size() != 2 ||
      (info.dtype != Dtype::f32 && info.dtype != Dtype::bf16 && info.dtype != Dtype::f16)) {
    refuse("factor has shape " + info.shape_text() + " and type " +
               std::string(dtype_name(info.dtype)),
           where, "Factors are 2-D, in F32, BF16 or F16.");
  }
  if (info.elements() == 0) {
    refuse("factor has shape " + info.shape_text() + ", which holds nothing", where,
           "Ranks start at 1.");
  }
}

}  // namespace

PeftFolder::PeftFolder(const fs::path& folder)
    : config_(read_peft_config(folder)), file_(factors_path(folder)) {
  const std::string path = file_path().string();
  SafetensorsHeader header = parse_safetensors_header(file_.bytes(), file_path());
  metadata_ = std::move(header.metadata);
  std::map<std::string, std::pair<std::optional<TensorInfo>, std::optional<TensorInfo>>> found;
  for (const auto& [key, info] : header.tensors) {
    std::string name = key;
    if (name.starts_with(kPeftKeyPrefix)) name.erase(0, kPeftKeyPrefix.size());
    if (name.starts_with(kWrapper)) name.erase(0, kWrapper.size());
    const bool is_a = name.ends_with(kSuffixA), is_b = name.ends_with(kSuffixB);
    if (!is_a && !is_b) {
      refuse("tensor '" + key + "' is no LoRA factor", path,
             "Only '....lora_A.weight' and '....lora_B.weight' are read.");
    }
    check_factor(info, path + ", tensor " + key);
    auto& pair = found[name.substr(0, name.size() - kSuffixA.size())];
    std::optional<TensorInfo>& factor = is_a ? pair.first : pair.second;
    if (factor) {
      refuse("tensor '" + key + "' is there twice, with and without a prefix", path,
             "The file is mixed from two; save the adapter again.");
    }
    factor = info;
  }
  for (const auto& [module, pair] : found) {
    if (!pair.first || !pair.second) {
      refuse(std::string("factor lora_") + (pair.first ? "B" : "A") + " of '" + module +
                 "' is missing",
             path, "The file is incomplete; save the adapter again.");
    }
    pairs_[module] = {*pair.first, *pair.second};
  }
  if (pairs_.empty()) {
    refuse("the adapter holds no factors", path,
           "An empty adapter file is the mark of a save that went wrong; save it again.");
  }
}

const StoredPair* PeftFolder::find(const std::string& module) const {
  const auto found = pairs_.find(module);
  return found == pairs_.end() ? nullptr : &found->second;
}

std::set<std::string> PeftFolder::dtypes() const {
  std::set<std::string> out;
  for (const auto& [module, pair] : pairs_) {
    out.emplace(dtype_name(pair.a.dtype));
    out.emplace(dtype_name(pair.b.dtype));
  }
  return out;
}

std::string PeftFolder::base_fingerprint() const {
  const auto found = metadata_.find(kBaseFingerprintKey);
  return found == metadata_.end() ? std::string() : found->second;
}

const std::byte* PeftFolder::bytes_of(const TensorInfo& factor) const {
  return file_.bytes().data() + factor.offset;
}

void PeftFolder::drop(const TensorInfo& factor, std::int64_t offset, std::int64_t bytes) const {
  file_.drop(static_cast<std::size_t>(factor.offset + offset), static_cast<std::size_t>(bytes));
}

bool PeftFolder::same_values(const TensorInfo& x, const TensorInfo& y) const {
  if (x.shape != y.shape || x.dtype != y.dtype) return false;
  const bool same = std::memcmp(bytes_of(x), bytes_of(y), static_cast<std::size_t>(x.bytes)) == 0;
  drop(x, 0, x.bytes);
  drop(y, 0, y.bytes);
  return same;
}

void PeftFolder::rows(const TensorInfo& factor, std::int64_t first, std::int64_t count,
                      float* out) const {
  const std::int64_t row_bytes = columns_of(factor) * dtype_bytes(factor.dtype);
  widen(factor.dtype, bytes_of(factor) + first * row_bytes, count * columns_of(factor), out);
  drop(factor, first * row_bytes, count * row_bytes);
}

void PeftFolder::unfold(const TensorInfo& factor, std::int64_t rank, std::int64_t experts,
                        std::int64_t first, std::int64_t count, float* out) const {
  constexpr std::int64_t kTile = 16;  // rows that are turned together: a cache line of each output
  const std::int64_t wide = rows_of(factor), across = columns_of(factor);
  const std::int64_t row_bytes = across * dtype_bytes(factor.dtype);
  std::vector<float> tile(static_cast<std::size_t>(kTile * across));
  std::int64_t dropped = 0;
  for (std::int64_t begin = 0; begin < wide; begin += kTile) {
    const std::int64_t end = std::min(wide, begin + kTile);
    widen(factor.dtype, bytes_of(factor) + begin * row_bytes, (end - begin) * across, tile.data());
    for (std::int64_t e = 0; e < count; ++e) {
      for (std::int64_t r = 0; r < rank; ++r) {
        const float* from = tile.data() + r * experts + first + e;
        float* to = out + (e * rank + r) * wide;
        for (std::int64_t i = begin; i < end; ++i) to[i] = from[(i - begin) * across];
      }
    }
    if ((end - dropped) * row_bytes >= kStripBytes || end == wide) {
      drop(factor, dropped * row_bytes, (end - dropped) * row_bytes);
      dropped = end;
    }
  }
}

void PeftFolder::check_finite() const {
  for (const auto& [module, pair] : pairs_) {
    for (const TensorInfo* factor : {&pair.a, &pair.b}) {
      const std::int64_t step = std::max<std::int64_t>(
          1, kStripBytes / (columns_of(*factor) * dtype_bytes(factor->dtype)));
      std::vector<float> values;
      for (std::int64_t row = 0; row < rows_of(*factor); row += step) {
        const std::int64_t count = std::min(step, rows_of(*factor) - row);
        values.resize(static_cast<std::size_t>(count * columns_of(*factor)));
        rows(*factor, row, count, values.data());
        if (std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); }))
          continue;
        refuse("factors hold NaN or infinite values", file_path().string() + ", " + module,
               "The run that wrote this adapter diverged; take an earlier checkpoint.");
      }
    }
  }
}

}  // namespace tailor
