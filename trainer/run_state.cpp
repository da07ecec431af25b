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
#include "base/units.h"
#include "data/checkpoint/safetensors.h"
#include "recipes/expert_selection.h"

namespace tailor {
namespace {

constexpr std::string_view kPrefix = "step-";
constexpr int kFormat = 1;         ///< one file of all
constexpr int kShardedFormat = 2;  ///< a file a rank

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

/// The arenas a checkpoint holds, by the names of their tensors.
struct StateArena {
  std::string name;
  std::span<float> values;
  const Arena* arena;
};
std::array<StateArena, 3> state_arenas(Adapter& adapter, AdamW& optimizer) {
  return {{{"factors", adapter.factors(), &adapter.arena()},
           {"first_moment", optimizer.first_moment(), &optimizer.first_arena()},
           {"second_moment", optimizer.second_moment(), &optimizer.second_arena()}}};
}

std::string shard_name(int rank, int ranks) {
  const auto number = [](int value) {
    const std::string digits = std::to_string(value);
    return std::string(5 - std::min<std::size_t>(5, digits.size()), '0') + digits;
  };
  return "state-" + number(rank + 1) + "-of-" + number(ranks) + ".safetensors";
}

/// A file of a checkpoint and which factors it has: one range, or a rank's share of each layer.
class StateFile {
 public:
  explicit StateFile(const fs::path& path)
      : file_(path), header_(parse_safetensors_header(file_.bytes(), path)), path_(path) {}

  /// Copies what of `wanted` the tensor has, whose first element is element `begin` of the arena
  /// and which must have `size` elements.
  void copy(const std::string& tensor, std::int64_t begin, std::int64_t size, const StateArena& to,
            FactorRange wanted) const {
    const auto found = header_.tensors.find(tensor);
    if (found == header_.tensors.end() || found->second.dtype != Dtype::f32 ||
        found->second.elements() != size) {
      throw Error(Fault::bad_file, {"tensor '" + tensor + "' is missing or has another size",
                                    path_.string(), "The file is damaged."});
    }
    const FactorRange both{std::max(begin, wanted.begin), std::min(begin + size, wanted.end)};
    if (both.empty()) return;
    // In pieces: neither file nor arena need be in memory whole.
    constexpr std::size_t kPiece = std::size_t{16} << 20U;
    constexpr auto kFloat = sizeof(float);
    const auto bytes =
        std::as_writable_bytes(to.values).subspan(static_cast<std::size_t>(both.begin) * kFloat,
                                                  static_cast<std::size_t>(both.size()) * kFloat);
    const auto from = static_cast<std::size_t>(found->second.offset) +
                      static_cast<std::size_t>(both.begin - begin) * kFloat;
    for (std::size_t at = 0; at < bytes.size(); at += kPiece) {
      const std::size_t piece = std::min(kPiece, bytes.size() - at);
      std::memcpy(bytes.data() + at, file_.bytes().data() + from + at, piece);
      to.arena->release(
          both.begin * static_cast<std::int64_t>(kFloat) + static_cast<std::int64_t>(at),
          static_cast<std::int64_t>(piece));
      file_.drop(from + at, piece);
    }
  }
  std::int64_t bytes() const { return static_cast<std::int64_t>(file_.bytes().size()); }

 private:
  MappedFile file_;
  SafetensorsHeader header_;
  fs::path path_;
};

/// What this process keeps of the factors.
std::vector<FactorRange> kept_ranges(const Adapter& adapter, const StateShare* share) {
  if (share == nullptr) return {{0, adapter.parameter_count()}};
  std::vector<FactorRange> out;
  for (int l = 0; l < share->shards.layers(); ++l) {
    out.push_back(share->shards.mine(l));
    out.push_back(share->shards.tail(l));
  }
  return out;
}

std::string layer_tensor(const std::string& arena, int layer, bool tail) {
  return arena + "." + std::to_string(layer) + (tail ? ".tail" : "");
}

/// The files' digests as the manifest has them, checked: each rank some of the files, all of them
/// told by the caller's agreement. Throws Error{bad_file}.
void check_files(const fs::path& folder, const Json& shards, const StateShare* share) {
  const std::size_t step = share == nullptr ? 1 : static_cast<std::size_t>(share->ranks.size());
  std::size_t at = share == nullptr ? 0 : static_cast<std::size_t>(share->ranks.rank());
  for (; at < shards.size(); at += step) {
    const JsonReader entry(shards[at], (folder / "manifest.json").string());
    const fs::path path = inside_folder(folder, entry.text("file"));
    if (sha256_file(path) != entry.text("sha256")) {
      throw Error(Fault::bad_file, {"the checkpoint's state does not match its checksum",
                                    path.string(), "The file is damaged."});
    }
  }
}

/// Throws Error{bad_file} when the checkpoint is not whole.
void restore(const fs::path& folder, Adapter& adapter, AdamW& optimizer,
             const RunIdentity& identity, const StateShare* share, SavedCheckpoint& out) {
  const fs::path manifest_path = folder / "manifest.json";
  const Json manifest = read_json(manifest_path);
  const JsonReader reader(manifest, manifest_path.string());
  const std::int64_t format = reader.integer("format");
  if (format != kFormat && format != kShardedFormat) {
    throw Error(Fault::usage,
                {"checkpoint format " + std::to_string(format) + " is not known", folder.string(),
                 "It was written by another version of Tailor: use that one."});
  }
  Json files = Json::array();
  if (format == kFormat) {
    files.push_back({{"file", "state.safetensors"}, {"sha256", reader.text("state_sha256")}});
  } else if (manifest.contains("shards") && manifest["shards"].is_array()) {
    files = manifest["shards"];
  }
  if (files.empty()) {
    throw Error(Fault::bad_file,
                {"the manifest names no state", manifest_path.string(), "The file is damaged."});
  }
  check_files(folder, files, share);
  out.sha256 = format == kFormat ? reader.text("state_sha256") : sha256_file(manifest_path);
  require_same(manifest, "layout", layout_digest(adapter), folder);
  require_same(manifest, "dataset", identity.dataset, folder);
  require_same(manifest, "seed", identity.seed, folder);
  require_same(manifest, "rows_per_step", identity.rows_per_step, folder);
  require_same(manifest, "shuffle", identity.shuffle, folder);
  TAILOR_CHECK(optimizer.pending() == 0, "flush before a checkpoint is restored");
  const std::vector<FactorRange> kept = kept_ranges(adapter, share);
  const int savers = narrow<int>(narrow<std::int64_t>(files.size()));
  for (int r = 0; r < savers; ++r) {
    const StateFile file(
        inside_folder(folder, files[static_cast<std::size_t>(r)].at("file").get<std::string>()));
    out.bytes += file.bytes();
    for (const StateArena& arena : state_arenas(adapter, optimizer)) {
      if (format == kFormat) {
        for (const FactorRange range : kept) {
          file.copy(arena.name, 0, adapter.parameter_count(), arena, range);
        }
        continue;
      }
      const FactorShards saved(adapter, r, savers);
      for (int l = 0; l < saved.layers(); ++l) {
        const auto copy = [&](FactorRange had, bool tail) {
          if (had.empty()) return;
          for (const FactorRange range : kept) {
            if (range.end <= had.begin || range.begin >= had.end) continue;
            file.copy(layer_tensor(arena.name, l, tail), had.begin, had.size(), arena, range);
          }
        };
        copy(saved.mine(l), false);
        if (r == 0) copy(saved.tail(l), true);
      }
    }
  }
  optimizer.set_steps(reader.integer("optimizer_steps"));
  out.step = reader.integer("step");
  out.folder = folder;
}

/// This rank's file of a sharded checkpoint.
void write_shard(const fs::path& path, const Adapter& adapter, const AdamW& optimizer,
                 const StateShare& share) {
  const std::array<std::pair<std::string, std::span<const float>>, 3> arenas = {
      {{"factors", adapter.factors()},
       {"first_moment", optimizer.first_moment()},
       {"second_moment", optimizer.second_moment()}}};
  std::vector<TensorToWrite> tensors;
  for (const auto& [name, values] : arenas) {
    for (int l = 0; l < share.shards.layers(); ++l) {
      const auto add = [&, &name = name, &values = values](FactorRange range, bool tail) {
        if (range.empty()) return;
        tensors.push_back({layer_tensor(name, l, tail),
                           Dtype::f32,
                           {range.size()},
                           std::as_bytes(values.subspan(static_cast<std::size_t>(range.begin),
                                                        static_cast<std::size_t>(range.size())))});
      };
      add(share.shards.mine(l), false);
      if (share.ranks.first()) add(share.shards.tail(l), true);
    }
  }
  write_safetensors(path, tensors);
}

/// `part`, of all ranks where there are more than one.
void together(const StateShare* share, const std::string& doing,
              const std::function<void()>& part) {
  if (share == nullptr) {
    part();
  } else {
    together(share->ranks, doing, part);
  }
}

Json manifest_of(const Adapter& adapter, const AdamW& optimizer, const RunIdentity& identity,
                 std::int64_t step) {
  return {{"step", step},
          {"optimizer_steps", optimizer.steps()},
          {"layout", layout_digest(adapter)},
          {"dataset", identity.dataset},
          {"seed", identity.seed},
          {"rows_per_step", identity.rows_per_step},
          {"shuffle", identity.shuffle}};
}

/// Takes the place of what a folder of that name holds.
void publish_over(const fs::path& checkpoints, const fs::path& staging,
                  const fs::path& final_folder) {
  std::error_code error;
  if (!fs::exists(final_folder, error)) {
    publish(staging, final_folder);
    return;
  }
  // The same step again, after a resume from an earlier one: same content, so the old one stays
  // until it is out of the way.
  const fs::path old = checkpoints / (".old-" + final_folder.filename().string());
  fs::remove_all(old, error);
  publish(final_folder, old);
  publish(staging, final_folder);
  fs::remove_all(old, error);
}

}  // namespace

SavedCheckpoint save_checkpoint(const fs::path& checkpoints, std::int64_t step,
                                const Adapter& adapter, const AdamW& optimizer,
                                const RunIdentity& identity, std::int64_t keep,
                                const StateShare* share) {
  TAILOR_CHECK(optimizer.pending() == 0, "flush before a checkpoint is saved");
  const bool first = share == nullptr || share->ranks.first();
  const int rank = share == nullptr ? 0 : share->ranks.rank();
  const int ranks = share == nullptr ? 1 : share->ranks.size();
  const fs::path staging = checkpoints / (".staging-" + step_name(step));
  const fs::path final_folder = checkpoints / step_name(step);
  const std::string doing = "saving the checkpoint of step " + std::to_string(step);
  std::error_code error;
  SavedCheckpoint out{final_folder, step, 0, ""};
  try {
    together(share, doing, [&] {
      if (!first) return;
      make_folders(checkpoints);
      fs::remove_all(staging, error);
      make_folders(staging);
    });
    const fs::path state =
        staging / (share == nullptr ? "state.safetensors" : shard_name(rank, ranks));
    std::string digest;
    together(share, doing, [&] {
      if (share != nullptr && !fs::exists(staging, error)) {
        throw Error(Fault::io,
                    {"the run's folder is not the one that rank 0 sees", staging.string(),
                     "Set output_dir to a folder on a file system that all nodes share."});
      }
      if (share == nullptr) {
        const auto n = adapter.parameter_count();
        write_safetensors(
            state, {{"factors", Dtype::f32, {n}, std::as_bytes(adapter.factors())},
                    {"first_moment", Dtype::f32, {n}, std::as_bytes(optimizer.first_moment())},
                    {"second_moment", Dtype::f32, {n}, std::as_bytes(optimizer.second_moment())}});
      } else {
        write_shard(state, adapter, optimizer, *share);
      }
      for (const Arena* arena :
           {&adapter.arena(), &optimizer.first_arena(), &optimizer.second_arena()}) {
        arena->release(0, arena->size());
      }
      digest = sha256_file(state);
      out.bytes = static_cast<std::int64_t>(fs::file_size(state));
    });
    const std::vector<std::string> digests =
        share == nullptr ? std::vector{digest} : all_texts(share->ranks, digest);
    if (share != nullptr) {
      out.bytes =
          static_cast<std::int64_t>(sum_over_ranks(share->ranks, static_cast<double>(out.bytes)));
    }
    together(share, doing, [&] {
      if (!first) return;
      Json manifest = manifest_of(adapter, optimizer, identity, step);
      if (share == nullptr) {
        manifest["format"] = kFormat;
        manifest["state_sha256"] = digest;
      } else {
        manifest["format"] = kShardedFormat;
        for (int r = 0; r < ranks; ++r) {
          manifest["shards"].push_back(
              {{"file", shard_name(r, ranks)}, {"sha256", digests[static_cast<std::size_t>(r)]}});
        }
      }
      const std::string text = manifest.dump(2) + "\n";
      out.sha256 = share == nullptr ? digest : sha256_hex(text);
      write_atomically(staging / "manifest.json", text);
      sync_path(staging);
      publish_over(checkpoints, staging, final_folder);
      const auto all = list_checkpoints(checkpoints);
      for (std::size_t i = static_cast<std::size_t>(keep); i < all.size(); ++i) {
        fs::remove_all(all[i].second, error);
      }
    });
  } catch (...) {
    if (first) fs::remove_all(staging, error);
    throw;
  }
  return out;
}

std::optional<SavedCheckpoint> load_newest_checkpoint(
    const fs::path& checkpoints, Adapter& adapter, AdamW& optimizer, const RunIdentity& identity,
    const std::function<void(const std::string&)>& warn, const StateShare* share) {
  const auto all = list_checkpoints(checkpoints);
  if (share != nullptr) {
    std::string names;
    for (const auto& [step, folder] : all) names += std::to_string(step) + " ";
    const std::vector<SharedFact> facts = {{"the run's checkpoints", names}};
    require_agreement(share->ranks, facts);
  }
  for (const auto& [step, folder] : all) {
    try {
      SavedCheckpoint found;
      together(share, "reading checkpoint " + folder.filename().string(), [&, &folder = folder] {
        restore(folder, adapter, optimizer, identity, share, found);
      });
      return found;
    } catch (const Error& error) {
      if (error.fault() == Fault::usage || error.fault() == Fault::device) throw;
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
