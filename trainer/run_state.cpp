#include "trainer/run_state.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <map>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/checkpoint/safetensors.h"
#include "recipes/expert_selection.h"

namespace tailor {
namespace {

constexpr std::string_view kPrefix = "step-";
constexpr int kFormat = 1;

std::string step_name(std::int64_t step) {
  std::string digits = std::to_string(step);
  return std::string(kPrefix) + std::string(8 - std::min<std::size_t>(8, digits.size()), '0') +
         digits;
}

/// Published checkpoints, newest first. Staging folders of interrupted saves are none.
std::vector<std::pair<std::int64_t, fs::path>> list_checkpoints(const fs::path& folder) {
  std::vector<std::pair<std::int64_t, fs::path>> out;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(kPrefix)) continue;
    std::int64_t step = 0;
    const char* end = name.data() + name.size();
    const auto [at, problem] = std::from_chars(name.data() + kPrefix.size(), end, step);
    if (problem == std::errc{} && at == end) out.emplace_back(step, entry.path());
  }
  std::sort(out.rbegin(), out.rend());
  return out;
}

/// Digest of which factors stand where in the arena.
std::string layout_digest(const Adapter& adapter) {
  std::string text;
  for (const LoraSite& site : adapter.sites()) {
    std::vector<std::string> parts = {site.module,
                                      std::string(projection_name(site.projection)),
                                      std::to_string(site.experts),
                                      std::to_string(site.rank),
                                      std::to_string(site.in),
                                      std::to_string(site.out)};
    if (!site.slot_of.empty()) parts.push_back(runs_text(site.chosen()));
    text += join(parts, ":");
    text += '\n';
  }
  return sha256_hex(text);
}

void require_same(const Json& manifest, const std::string& key, const Json& now,
                  const fs::path& folder) {
  if (manifest.contains(key) && manifest.at(key) == now) return;
  const std::map<std::string, std::string> words = {
      {"layout", "LoRA targets, ranks or choice of experts"},
      {"dataset", "training data"},
      {"seed", "seed"},
      {"rows_per_step", "number of rows a step"},
      {"shuffle", "setting of training.shuffle"}};
  throw Error(
      Fault::usage,
      {"the checkpoint was made with another " + words.at(key), folder.string(),
       "Go on with the recipe the run was started with (recipe.resolved.yaml in its folder), "
       "or start a new run in another output_dir."});
}

/// Throws Error{bad_file} when the checkpoint is not whole.
void restore(const fs::path& folder, Adapter& adapter, AdamW& optimizer,
             const RunIdentity& identity, SavedCheckpoint& out) {
  const Json manifest = read_json(folder / "manifest.json");
  const JsonReader reader(manifest, (folder / "manifest.json").string());
  if (reader.integer("format") != kFormat) {
    throw Error(Fault::usage,
                {"checkpoint format " + std::to_string(reader.integer("format")) + " is not known",
                 folder.string(), "It was written by another version of Tailor: use that one."});
  }
  const fs::path state = folder / "state.safetensors";
  out.sha256 = sha256_file(state);
  if (out.sha256 != reader.text("state_sha256")) {
    throw Error(Fault::bad_file, {"the checkpoint's state does not match its checksum",
                                  state.string(), "The file is damaged."});
  }
  require_same(manifest, "layout", layout_digest(adapter), folder);
  require_same(manifest, "dataset", identity.dataset, folder);
  require_same(manifest, "seed", identity.seed, folder);
  require_same(manifest, "rows_per_step", identity.rows_per_step, folder);
  require_same(manifest, "shuffle", identity.shuffle, folder);
  const MappedFile file(state);
  const SafetensorsHeader header = parse_safetensors_header(file.bytes(), state);
  const auto copy = [&](const char* name, std::span<float> to, const Arena& arena) {
    const auto found = header.tensors.find(name);
    if (found == header.tensors.end() || found->second.dtype != Dtype::f32 ||
        found->second.elements() != static_cast<std::int64_t>(to.size())) {
      throw Error(Fault::bad_file,
                  {std::string("tensor '") + name + "' is missing or has another size",
                   state.string(), "The file is damaged."});
    }
    // In pieces: neither file nor arena need be in memory whole.
    constexpr std::size_t kPiece = std::size_t{16} << 20U;
    const auto bytes = std::as_writable_bytes(to);
    const auto from = static_cast<std::size_t>(found->second.offset);
    for (std::size_t at = 0; at < bytes.size(); at += kPiece) {
      const std::size_t piece = std::min(kPiece, bytes.size() - at);
      std::memcpy(bytes.data() + at, file.bytes().data() + from + at, piece);
      arena.release(static_cast<std::int64_t>(at), static_cast<std::int64_t>(piece));
      file.drop(from + at, piece);
    }
  };
  TAILOR_CHECK(optimizer.pending() == 0, "flush before a checkpoint is restored");
  copy("factors", adapter.factors(), adapter.arena());
  copy("first_moment", optimizer.first_moment(), optimizer.first_arena());
  copy("second_moment", optimizer.second_moment(), optimizer.second_arena());
  optimizer.set_steps(reader.integer("optimizer_steps"));
  out.step = reader.integer("step");
  out.folder = folder;
  out.bytes = static_cast<std::int64_t>(file.bytes().size());
}

}  // namespace

SavedCheckpoint save_checkpoint(const fs::path& checkpoints, std::int64_t step,
                                const Adapter& adapter, const AdamW& optimizer,
                                const RunIdentity& identity, std::int64_t keep) {
  TAILOR_CHECK(optimizer.pending() == 0, "flush before a checkpoint is saved");
  make_folders(checkpoints);
  const fs::path staging = checkpoints / (".staging-" + step_name(step));
  const fs::path final_folder = checkpoints / step_name(step);
  std::error_code error;
  fs::remove_all(staging, error);
  SavedCheckpoint out{final_folder, step, 0, ""};
  try {
    make_folders(staging);
    const auto n = adapter.parameter_count();
    const fs::path state = staging / "state.safetensors";
    write_safetensors(
        state, {{"factors", Dtype::f32, {n}, std::as_bytes(adapter.factors())},
                {"first_moment", Dtype::f32, {n}, std::as_bytes(optimizer.first_moment())},
                {"second_moment", Dtype::f32, {n}, std::as_bytes(optimizer.second_moment())}});
    for (const Arena* arena :
         {&adapter.arena(), &optimizer.first_arena(), &optimizer.second_arena()}) {
      arena->release(0, arena->size());
    }
    out.sha256 = sha256_file(state);
    out.bytes = static_cast<std::int64_t>(fs::file_size(state));
    const Json manifest = {{"format", kFormat},
                           {"step", step},
                           {"optimizer_steps", optimizer.steps()},
                           {"state_sha256", out.sha256},
                           {"layout", layout_digest(adapter)},
                           {"dataset", identity.dataset},
                           {"seed", identity.seed},
                           {"rows_per_step", identity.rows_per_step},
                           {"shuffle", identity.shuffle}};
    write_atomically(staging / "manifest.json", manifest.dump(2) + "\n");
    sync_path(staging);
    if (fs::exists(final_folder, error)) {
      // The same step again, after a resume from an earlier one: same content, so the old one stays
      // until it is out of the way.
      const fs::path old = checkpoints / (".old-" + step_name(step));
      fs::remove_all(old, error);
      publish(final_folder, old);
      publish(staging, final_folder);
      fs::remove_all(old, error);
    } else {
      publish(staging, final_folder);
    }
  } catch (...) {
    fs::remove_all(staging, error);
    throw;
  }
  const auto all = list_checkpoints(checkpoints);
  for (std::size_t i = static_cast<std::size_t>(keep); i < all.size(); ++i)
    fs::remove_all(all[i].second, error);
  return out;
}

std::optional<SavedCheckpoint> load_newest_checkpoint(
    const fs::path& checkpoints, Adapter& adapter, AdamW& optimizer, const RunIdentity& identity,
    const std::function<void(const std::string&)>& warn) {
  const auto all = list_checkpoints(checkpoints);
  for (const auto& [step, folder] : all) {
    try {
      SavedCheckpoint found;
      restore(folder, adapter, optimizer, identity, found);
      return found;
    } catch (const Error& error) {
      if (error.fault() == Fault::usage) throw;
      warn("checkpoint " + folder.filename().string() + " cannot be used: " + error.parts().what);
    }
  }
  if (all.empty()) return std::nullopt;
  throw Error(Fault::bad_file,
              {"none of the run's " + std::to_string(all.size()) + " checkpoints is whole",
               checkpoints.string(),
               "Start the run afresh in another output_dir, or restore a checkpoint from a copy."});
}

}  // namespace tailor
