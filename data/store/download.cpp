#include "data/store/download.h"

#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/json.h"

namespace tailor {
namespace {

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kSingleName = "model.safetensors";

/// Whether a file holds JSON: one that is being written does not yet.
bool is_json(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return false;
  try {
    static_cast<void>(read_json(path));
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

std::string Download::awaited() const {
  if (!is_json(model_ / "config.json")) return "config.json";
  if (is_json(model_ / kIndexName)) return "";
  std::error_code error;
  // Without an index only the file itself says what it will hold.
  if (!fs::exists(model_ / kSingleName, error)) return kIndexName;
  std::map<std::string, std::string> missing;
  static_cast<void>(Checkpoint::open_arrived(model_, missing));
  return missing.empty() ? "" : kSingleName;
}

std::map<std::string, Download::State> Download::states() const {
  std::map<std::string, State> out;
  for (const auto& entry : fs::directory_iterator(model_)) {
    const std::string name = entry.path().filename();
    if (!name.ends_with(".safetensors")) continue;
    struct stat info {};
    if (::stat(entry.path().c_str(), &info) != 0) continue;
    out[name] = {info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec, info.st_ino};
  }
  return out;
}

bool Download::look() {
  if (!follow_) {
    if (checkpoint_ != nullptr) return false;
    checkpoint_ = std::make_shared<const Checkpoint>(Checkpoint::open(model_));
    return true;
  }
  std::map<std::string, State> now = states();
  if (checkpoint_ != nullptr && now == seen_) return false;
  std::map<std::string, std::string> missing;
  checkpoint_ = std::make_shared<const Checkpoint>(Checkpoint::open_arrived(model_, missing));
  missing_ = std::move(missing);
  seen_ = std::move(now);
  return true;
}

std::string Download::text_of_missing(const std::string& shard) const {
  const auto found = missing_.find(shard);
  if (found == missing_.end() || found->second.empty()) return shard;
  return shard + " (not whole yet: " + found->second + ")";
}

void Download::remove(const fs::path& shard) {
  std::error_code error;
  if (fs::is_symlink(shard, error)) {
    const fs::path target = fs::canonical(shard, error);
    if (!error) ::unlink(target.c_str());
  }
  ::unlink(shard.c_str());
}

}  // namespace tailor
