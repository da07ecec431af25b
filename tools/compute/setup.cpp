#include "tools/compute/setup.h"

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>

#include "adapters/peft_files.h"
#include "adapters/peft_reader.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/text.h"
#include "base/url.h"
#include "data/store/fingerprint.h"
#include "data/store/pack.h"
#include "data/tokens/token_store.h"
#include "recipes/machine.h"
#include "tools/paths.h"
#include "tools/recipe_inputs.h"

namespace tailor {

void refuse_unsupported(const Recipe& recipe) {
  if (recipe.compute.device == DeviceChoice::cuda)
    require_cpu("cuda", recipe.name + ": compute.device");
  const auto refuse = [&](const std::string& what, const std::string& key,
                          const std::string& mend) {
    throw Error(Fault::usage, {what, recipe.name + ": " + key, mend});
  };
  if (const auto& address = recipe.logging.mlflow;
      address && !has_scheme(*address, "http") && !has_scheme(*address, "https")) {
    refuse("not the address of an MLflow server: " + without_password(*address), "logging.mlflow",
           "Write http://HOST:PORT or https://HOST.");
  }
}

void require_cpu(const std::string& device, const std::string& where) {
  if (device == "auto" || device == "cpu") return;
  if (device != "cuda") {
    throw Error(Fault::usage, {"device '" + device + "' is not known", where, "Use auto or cpu."});
  }
  throw Error(Fault::device, {"this version computes on the CPU only", where,
                              "Use device auto or cpu. `tailor plan` answers for GPUs."});
}

at::ScalarType compute_type(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  throw Error(Fault::usage,
              {"dtype '" + name + "' is not known", "--dtype", "Use float32 or bfloat16."});
}

int set_threads(int threads) {
  if (threads <= 0) {
    cpu_set_t cores;
    threads = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  }
  at::set_num_threads(threads);
  return threads;
}

namespace {

std::int64_t free_memory(const fs::path& folder) {
  return static_cast<std::int64_t>(this_machine(folder).host_bytes);
}

/// The store of a model in these formats in the user's cache, packed now if it is not there. Other
/// weights, of which the fingerprint sees but some, and another config.json are another store.
fs::path cached_store(const fs::path& folder, const BaseRequest& request) {
  const Checkpoint checkpoint = Checkpoint::open(folder);
  const ModelSpec spec = read_model_spec(folder);
  std::string key = fs::weakly_canonical(folder).string() + "\n" + fingerprint(checkpoint, spec) +
                    "\n" + read_text(folder / "config.json") + "\n";
  for (const auto& [name, file] : checkpoint.shards()) key += file_stamp(file);
  for (const FormatChoice& choice : {request.formats.experts, request.formats.others}) {
    key += "\n" + std::to_string(choice.as_is) + " " +
           std::to_string(static_cast<int>(choice.kind)) + " " + std::to_string(choice.group);
  }
  const fs::path to = cache_folder() / "stores" / sha256_hex(key).substr(0, 16);
  std::error_code error;
  if (fs::exists(to / kManifestName, error)) return to;
  make_folders(to.parent_path());
  PackOptions options;
  options.formats = request.formats;
  options.source = request.model_name;
  options.threads = at::get_num_threads();
  log_info("packing the base into " + to.string() + ", once");
  double told = 0;
  options.progress = [&](const PackProgress& at) {
    if (at.seconds - told < 10) return;
    told = at.seconds;
    log_info("packing: " + bytes_text(at.bytes_done) + " of " + bytes_text(at.bytes));
  };
  const PackReport report = pack_store(folder, to, options);
  log_info("packed " + bytes_text(report.bytes) + " in " + seconds_text(report.seconds));
  return to;
}

OpenedModel open_store(const fs::path& folder, const fs::path& path, at::ScalarType dtype,
                       const BaseRequest& request) {
  OpenedModel out;
  out.folder = folder;
  const auto store = std::make_shared<const Store>(Store::open(path));
  out.spec = store->spec();
  out.prefix = store->prefix();
  out.source = store->source();
  std::string hashes;
  for (const StoredUnit& unit : store->layout().units) hashes += hash_text(store->hash(unit));
  out.stored_digest = sha256_hex(hashes);
  StreamOptions options;
  options.device_bytes = request.device_bytes;
  options.host_bytes = request.host_bytes;
  options.ranks = request.ranks;
  if (!options.device_bytes && !options.host_bytes && !request.all_resident) {
    const std::int64_t free = free_memory(folder);
    if (store->layout().bytes() > free / 10 * 8) options.host_bytes = free / 2;
  }
  auto weights = StoreWeights::open(store, dtype, options);
  out.stream = weights->facts();
  out.weight_bytes = weights->memory_bytes();
  out.decoder = Decoder::create(std::move(weights), dtype);
  return out;
}

}  // namespace

bool wants_store(const Recipe& recipe, const Plan& plan) {
  const BaseRecipe& base = recipe.base;
  return !recipe_store(recipe).empty() || base.format != BaseFormat::as_is ||
         base.non_expert_format != BaseFormat::as_is || base.device_memory || base.host_memory ||
         *plan.stream_bytes_per_step.value > 0;
}

void pack_base(const fs::path& folder, const BaseRequest& request) {
  if (request.pack && request.store.empty() && !Store::is_store(folder)) {
    cached_store(folder, request);
  }
}

OpenedModel open_model(const fs::path& folder, at::ScalarType dtype, const BaseRequest& request) {
  const double began = seconds_now();
  OpenedModel out;
  const bool is_store = Store::is_store(folder);
  if (is_store || !request.store.empty() || request.pack) {
    const fs::path path = is_store                ? folder
                          : request.store.empty() ? cached_store(folder, request)
                                                  : request.store;
    out = open_store(folder, path, dtype, request);
    out.load_seconds = seconds_now() - began;
    return out;
  }
  out.folder = folder;
  out.spec = read_model_spec(folder);
  const Checkpoint checkpoint = Checkpoint::open(folder);
  out.prefix = checkpoint.prefix();
  const std::int64_t needed =
      out.spec.parameters() * static_cast<std::int64_t>(c10::elementSize(dtype));
  const std::int64_t free_bytes = free_memory(folder);
  if (needed > free_bytes) {
    throw Error(Fault::does_not_fit,
                {"the model's weights need " + bytes_text(needed) + " of memory, " +
                     bytes_text(free_bytes) + " are free",
                 folder.string(),
                 "Pack the model and use the store instead, its weights then come from disk as "
                 "they are needed: tailor model pack " +
                     folder.string() + " --to DIR"});
  }
  auto weights = resident_weights(out.spec, load_weights(checkpoint, out.spec, dtype));
  out.weight_bytes = weights->memory_bytes();
  out.decoder = Decoder::create(std::move(weights), dtype);
  out.load_seconds = seconds_now() - began;
  return out;
}

Adapter open_adapter(const fs::path& folder, const OpenedModel& model) {
  const PeftReader reader(folder, model.spec);
  const std::string trained_on = reader.folder().base_fingerprint();
  if (!trained_on.empty() && trained_on != read_routed_model(model.folder).fingerprint) {
    log_warning("the adapter in " + folder.string() +
                " was trained on other weights than those in " + model.folder.string());
  }
  return read_peft_adapter(reader);
}

std::string stream_text(const StreamFacts& facts) {
  const std::int64_t all = facts.resident_bytes + facts.streamed.forward;
  if (facts.ranks > 1) {
    std::string out = bytes_text(facts.tile_bytes.forward) + " over " +
                      std::to_string(facts.ranks) + " ranks, a rank's part " + bytes_text(all) +
                      ": " + bytes_text(facts.resident_bytes) + " in memory";
    if (facts.streamed.forward > 0) out += ", the rest is read from disk as it is used";
    return out + "; gathered into " + bytes_text(facts.ring_bytes) + " of slots";
  }
  if (facts.streamed.forward == 0) return "all " + bytes_text(all) + " in memory";
  std::string out = bytes_text(facts.resident_bytes) + " of " + bytes_text(all) +
                    " in memory, the rest is read from disk as it is used (" +
                    name_of(facts.reader.engine) +
                    (facts.reader.direct ? ", past the page cache" : ", through the page cache") +
                    ") into " + bytes_text(facts.ring_bytes) + " of slots";
  if (!facts.reader.why.empty()) out += "; " + facts.reader.why;
  return out;
}

}  // namespace tailor
