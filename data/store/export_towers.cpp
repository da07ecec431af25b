#include "data/store/export_towers.h"

#include <map>

#include "base/error.h"

namespace tailor {

std::vector<TowerTensor> tower_tensors(const fs::path& model) {
  std::map<std::string, TowerTensor> found;
  std::error_code error;
  fs::directory_iterator entries(model, error);
  if (error) throw io_error(error.value(), "cannot read", model.string());
  for (const auto& entry : entries) {
    if (entry.path().extension() != ".safetensors") continue;
    const MappedFile file(entry.path());
    for (auto& [name, info] : parse_safetensors_header(file.bytes(), entry.path()).tensors) {
      if (name.starts_with("language_model.")) continue;
      if (!found.emplace(name, TowerTensor{name, info, entry.path()}).second) {
        throw Error(Fault::bad_file, {"tensor " + name + " is in two files", entry.path().string(),
                                      "Keep one download of the model in the folder."});
      }
    }
  }
  if (found.empty()) {
    throw Error(Fault::bad_file, {"there is no tower beside the language model", model.string(),
                                  "Name the published multimodal model with --towers-from."});
  }
  std::vector<TowerTensor> out;
  for (auto& [name, tensor] : found) out.push_back(std::move(tensor));
  return out;
}

}  // namespace tailor
