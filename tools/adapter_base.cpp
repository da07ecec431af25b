#include "tools/adapter_base.h"

#include "base/error.h"
#include "base/json.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/fingerprint.h"
#include "data/store/store.h"
#include "recipes/model_facts.h"
#include "tools/paths.h"

namespace tailor {
namespace {

bool has_safetensors(const fs::path& folder) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename();
    if (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) return true;
  }
  return false;
}

/// The multimodal wrapper holds its text model as `language_model`.
std::string prefix_of(const Json& config) {
  const auto found = config.find("architectures");
  if (found == config.end() || !found->is_array() || found->empty()) return "";
  const Json& first = found->front();
  return first == "Llama4ForConditionalGeneration" ? "language_model." : "";
}

AdapterBase of_config(const fs::path& path) {
  const Json config = read_json(path);
  return {path, model_spec_from_config(config, path.string()), prefix_of(config), ""};
}

}  // namespace

AdapterBase find_adapter_base(const std::string& model) {
  std::error_code error;
  if (fs::is_regular_file(model, error)) return of_config(model);
  fs::path folder;
  try {
    folder = find_model_folder(model);
  } catch (const Error&) {
    const std::optional<fs::path> shipped = shipped_config(model, recipes_folder() / "models");
    if (!shipped) throw;
    return of_config(*shipped);
  }
  AdapterBase out;
  if (Store::is_store(folder)) {
    const Store store = Store::open(folder);
    out = of_config(folder / "config.json");
    out.spec = store.spec();
    out.prefix = store.prefix();
    out.fingerprint = store.fingerprint();
  } else {
    read_model_spec(folder);  // names a config.json that is missing
    out = of_config(folder / "config.json");
    if (has_safetensors(folder)) {
      const Checkpoint checkpoint = Checkpoint::open(folder);
      out.prefix = checkpoint.prefix();
      out.fingerprint = fingerprint(checkpoint, out.spec);
    }
  }
  out.folder = folder;
  return out;
}

std::optional<AdapterBase> recorded_base(const std::string& model) {
  if (model.empty()) return std::nullopt;
  try {
    return find_adapter_base(model);
  } catch (const Error&) {
    return std::nullopt;
  }
}

}  // namespace tailor
