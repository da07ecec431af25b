#include "data/checkpoint/checkpoint.h"

#include <algorithm>
#include <cstdlib>
#include <set>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/gguf/model.h"

namespace tailor {
namespace {

constexpr std::string_view kWrapperPrefix = "language_model.";
constexpr std::string_view kIndexName = "model.safetensors.index.json";

fs::path hub_folder() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const char* value = std::getenv(name); value != nullptr && *value != '\0') return value;
  }
  if (const char* value = std::getenv("HF_HOME"); value != nullptr && *value != '\0') {
    return fs::path(value) / "hub";
  }
  const char* home = std::getenv("HOME");
  return fs::path(home != nullptr ? home : "/root") / ".cache/huggingface/hub";
}

/// The snapshot that `refs/main` names, else the only or newest one.
std::optional<fs::path> newest_snapshot(const fs::path& repository) {
  std::error_code error;
  if (fs::is_regular_file(repository / "refs/main", error)) {
    const std::string commit(trim(read_text(repository / "refs/main")));
    const fs::path snapshot = repository / "snapshots" / commit;
    if (!commit.empty() && commit.find('/') == std::string::npos &&
        fs::is_directory(snapshot, error))
      return snapshot;
  }
  std::optional<fs::path> newest;
  for (const auto& entry : fs::directory_iterator(repository / "snapshots", error)) {
    if (!newest || fs::last_write_time(entry.path()) > fs::last_write_time(*newest))
      newest = entry.path();
  }
  return newest;
}

/// Shard file names: those of the index, or the single file; and the tensors an index promises.
struct Shards {
  std::vector<std::string> names;
  std::map<std::string, std::string> promised;  ///< tensor -> shard
};
Shards find_shards(const fs::path& folder) {
  const fs::path index = folder / kIndexName;
  std::error_code error;
  if (fs::exists(index, error)) {
    const Json json = read_json(index);
    const JsonReader reader(json, index.string());
    const Json& map = reader.at("weight_map");
    std::set<std::string> names;
    Shards out;
    for (const auto& [tensor, file] : map.items()) {
      if (!file.is_string()) {
        throw Error(Fault::bad_file, {"weight_map gives tensor '" + tensor + "' no file name",
                                      index.string(), "Download the index again."});
      }
      names.insert(file.get<std::string>());
      out.promised[tensor] = file.get<std::string>();
    }
    out.names.assign(names.begin(), names.end());
    return out;
  }
  if (fs::exists(folder / "model.safetensors", error)) return {{"model.safetensors"}, {}};
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string extension = entry.path().extension();
    if (extension == ".bin" || extension == ".pt" || extension == ".pth") {
      throw Error(
          Fault::bad_file,
          {"the model's weights are pickle files, which Tailor does not open",
           entry.path().string(),
           "Pickle files can run code when they are loaded. Convert them with transformers on "
           "a machine you trust: AutoModelForCausalLM.from_pretrained(DIR)"
           ".save_pretrained(OUT, safe_serialization=True)."});
    }
  }
  throw Error(Fault::bad_file,
              {"no model.safetensors and no model.safetensors.index.json", folder.string(),
               "Name the folder that holds the model's config.json and safetensors files."});
}

}  // namespace

fs::path find_model_folder(const std::string& base_model) {
  std::error_code error;
  if (const auto gguf = find_gguf_file(base_model)) return unpacked_gguf(*gguf);
  if (fs::is_directory(base_model, error)) return base_model;
  const bool repository_name = std::count(base_model.begin(), base_model.end(), '/') == 1 &&
                               base_model.front() != '/' && base_model.front() != '.';
  if (repository_name) {
    std::string folder = "models--" + base_model;
    folder.replace(folder.find('/'), 1, "--");
    if (const auto snapshot = newest_snapshot(hub_folder() / folder)) {
      if (const auto gguf = find_gguf_file(*snapshot)) return unpacked_gguf(*gguf);
      return *snapshot;
    }
  }
  throw Error(
      Fault::usage,
      {"no such model: '" + base_model + "'",
       "looked for a folder of that name" +
           (repository_name ? ", then in " + hub_folder().string() : std::string()),
       repository_name
           ? "Download it first: pip install huggingface_hub && hf download " + base_model
           : "Give a folder with config.json and safetensors files, a GGUF file, or a Hugging Face "
             "repository name such as HuggingFaceTB/SmolLM2-135M-Instruct, downloaded with: "
             "hf download NAME"});
}

Checkpoint Checkpoint::open(const fs::path& folder) { return open_shards(folder, nullptr); }

Checkpoint Checkpoint::open_arrived(const fs::path& folder,
                                    std::map<std::string, std::string>& missing) {
  missing.clear();
  return open_shards(folder, &missing);
}

Checkpoint Checkpoint::open_shards(const fs::path& folder,
                                   std::map<std::string, std::string>* missing) {
  Checkpoint out;
  out.folder_ = folder;
  std::map<std::string, Tensor, std::less<>> stored;
  const Shards shards = find_shards(folder);
  std::set<std::string> opened;
  for (const std::string& name : shards.names) {
    const fs::path path = inside_folder(folder, name);
    std::error_code error;
    if (!fs::exists(path, error)) {
      if (missing != nullptr) {
        missing->emplace(name, "");
        continue;
      }
      throw Error(Fault::bad_file,
                  {"shard " + name + " is missing", folder.string(),
                   "Finish the download: the index names this file, the folder lacks it."});
    }
    SafetensorsHeader header;
    std::optional<MappedFile> file;
    try {
      file.emplace(path);
      header = parse_safetensors_header(file->bytes(), path);
    } catch (const Error& reason) {
      if (missing == nullptr) throw;
      missing->emplace(name, reason.parts().what);  // still growing, we trust
      continue;
    }
    opened.insert(name);
    out.shards_.push_back(std::move(*file));
    out.shard_names_.push_back(name);
    for (auto& [tensor, info] : header.tensors) {
      out.total_bytes_ += info.bytes;
      const bool fresh =
          stored.emplace(tensor, Tensor{info, out.shards_.size() - 1, tensor}).second;
      if (!fresh) {
        throw Error(Fault::bad_file, {"tensor '" + tensor + "' is in two shards", path.string(),
                                      "Remove files of another download from the model's folder."});
      }
    }
  }
  std::map<std::string, std::string> promised = shards.promised;
  out.has_index_ = !promised.empty();
  for (const auto& [tensor, shard] : promised) {
    if (opened.count(shard) == 0) continue;
    const auto found = stored.find(tensor);
    if (found != stored.end() &&
        out.shards_[found->second.shard].path().filename() == fs::path(shard).filename())
      continue;
    throw Error(Fault::bad_file,
                {"shard " + shard + " lacks tensor '" + tensor + "', which the index says it holds",
                 (folder / kIndexName).string(),
                 "Index and shards are of different downloads: fetch the folder again."});
  }
  if (promised.empty()) {
    for (const auto& entry : stored) promised[entry.first] = shards.names.front();
  }
  const auto wrapped_name = [](const std::string& name) {
    return name.starts_with(kWrapperPrefix);
  };
  const bool wrapped = std::any_of(promised.begin(), promised.end(),
                                   [&](const auto& entry) { return wrapped_name(entry.first); });
  if (wrapped) out.prefix_ = kWrapperPrefix;
  const auto of_text = [&](const std::string& name) { return !wrapped || wrapped_name(name); };
  for (auto& [name, tensor] : stored) {
    if (of_text(name)) out.tensors_.emplace(name.substr(out.prefix_.size()), tensor);
  }
  for (auto& [name, shard] : promised) {
    if (of_text(name)) out.promised_.emplace(name.substr(out.prefix_.size()), shard);
  }
  return out;
}

std::vector<const std::string*> Checkpoint::companions(const std::string& name) const {
  constexpr std::string_view kWeight = ".weight";
  const std::string module =
      name.ends_with(kWeight) ? name.substr(0, name.size() - kWeight.size()) : name;
  std::vector<const std::string*> out;
  for (auto at = promised_.lower_bound(module);
       at != promised_.end() && at->first.starts_with(module); ++at) {
    const std::string_view rest = std::string_view(at->first).substr(module.size());
    if (rest.empty() || rest.starts_with(kWeight) || rest.starts_with("_scale"))
      out.push_back(&at->first);
  }
  return out;
}

bool Checkpoint::arrived_with_companions(const std::string& name) const {
  const auto names = companions(name);
  return !names.empty() && std::all_of(names.begin(), names.end(),
                                       [&](const std::string* each) { return has(*each); });
}

std::vector<std::string> Checkpoint::promised_shards(const std::string& name) const {
  std::set<std::string> out;
  for (const std::string* each : companions(name)) out.insert(promised_.find(*each)->second);
  return {out.begin(), out.end()};
}

std::vector<std::pair<std::string, fs::path>> Checkpoint::shards() const {
  std::vector<std::pair<std::string, fs::path>> out;
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    out.emplace_back(shard_names_[i], shards_[i].path());
  }
  return out;
}

bool Checkpoint::has_shard(const std::string& name) const {
  return std::find(shard_names_.begin(), shard_names_.end(), name) != shard_names_.end();
}

const Checkpoint::Tensor& Checkpoint::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  if (found != tensors_.end()) return found->second;
  std::vector<std::string> names;
  for (const auto& entry : tensors_) names.push_back(entry.first);
  const std::string near = nearest_name(name, names);
  throw Error(
      Fault::bad_file,
      {"tensor '" + std::string(name) + "' is missing from the model", folder_.string(),
       (near.empty() ? "" : "The nearest name there is '" + near + "'. ") +
           "Check that config.json belongs to these weights and that every shard is complete."});
}

const Checkpoint::Tensor& Checkpoint::find(std::string_view name,
                                           std::span<const std::int64_t> shape) const {
  const Tensor& tensor = find(name);
  if (!std::equal(shape.begin(), shape.end(), tensor.info.shape.begin(), tensor.info.shape.end())) {
    const TensorInfo wanted{tensor.info.dtype, {shape.begin(), shape.end()}, 0, 0};
    throw Error(Fault::bad_file,
                {"shape of '" + std::string(name) + "' is " + tensor.info.shape_text() +
                     ", config.json asks for " + wanted.shape_text(),
                 where(tensor), "Check that config.json belongs to these weights."});
  }
  return tensor;
}

std::span<const std::byte> Checkpoint::bytes(const Tensor& tensor) const {
  return shards_[tensor.shard].bytes().subspan(static_cast<std::size_t>(tensor.info.offset),
                                               static_cast<std::size_t>(tensor.info.bytes));
}

std::string Checkpoint::where(const Tensor& tensor) const {
  return shards_[tensor.shard].path().string() + ", tensor " + tensor.stored_name;
}

void Checkpoint::drop(const Tensor& tensor) const {
  shards_[tensor.shard].drop(static_cast<std::size_t>(tensor.info.offset),
                             static_cast<std::size_t>(tensor.info.bytes));
}

}  // namespace tailor
