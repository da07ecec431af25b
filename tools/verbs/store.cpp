#include <algorithm>
#include <cstdio>
#include <iostream>

#include "base/cores.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/checkpoint/checkpoint.h"
#include "data/store/pack.h"
#include "data/store/synthetic.h"
#include "data/store/verify.h"
#include "recipes/choices.h"
#include "recipes/scalars.h"
#include "tools/interrupt.h"
#include "tools/paths.h"
#include "tools/recipe_inputs.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

int threads_or_all(int threads) { return threads > 0 ? threads : usable_cores(); }

/// --format and its neighbours in the words of a recipe's base.format.
StoreFormats formats_of(const std::string& experts, const std::string& others, std::int64_t group) {
  const auto format_of = [](const std::string& name) {
    for (const auto& [word, format] : Choices<BaseFormat>::kWords) {
      if (word == name) return format;
    }
    throw Error(Fault::usage, {"format '" + name + "' is not known", "--format",
                               "Use int4, nf4, fp8, bf16 or as_is."});
  };
  BaseRecipe base;
  base.format = format_of(experts);
  base.non_expert_format = format_of(others);
  if (group > 0) base.group_size = static_cast<int>(group);
  return store_formats(base);
}

std::string error_text(const LayerError& error) {
  std::string out = "layer " + std::to_string(error.layer) +
                    (error.experts ? ", experts" : ", the rest") + ": error " +
                    number_text(100 * error.relative(), 3) + " % of the weights";
  if (error.absmax_squared_error > 0) {
    out += ", mean square " + number_text(error.squared_error / error.absmax_squared_error, 3) +
           " x that of scales from the largest value";
  }
  return out;
}

/// Progress of a long pass over a store.
class StoreProgress {
 public:
  void show(const std::string& doing, std::int64_t done, std::int64_t before, std::int64_t bytes,
            double seconds, const std::string& note) {
    if (bytes == 0) {
      line_.show(note);
      return;
    }
    std::string text = progress_text(doing, done, before, bytes, seconds);
    if (!note.empty()) text += ", " + note;
    line_.show(text);
  }
  void say(const std::string& text) { line_.say(text); }

 private:
  ProgressLine line_{true};
};

/// config.json of a folder, a repository in the local cache, or a published config in `models`
/// ("a/b" is a--b.json there) whose repository's name, with or without "a/", begins with `name`.
fs::path find_config(const std::string& name, const fs::path& models) {
  std::error_code error;
  if (fs::is_regular_file(name, error)) return name;
  if (fs::is_directory(name, error)) return fs::path(name) / "config.json";
  std::vector<std::string> known, meant;
  fs::path found;
  for (const auto& entry : fs::directory_iterator(models, error)) {
    std::string repository = entry.path().stem();
    if (const auto at = repository.find("--"); at != std::string::npos) {
      repository.replace(at, 2, "/");
    }
    known.push_back(repository);
    const std::string short_name = repository.substr(repository.find('/') + 1);
    if (lower(repository) == lower(name) || lower(short_name) == lower(name)) return entry.path();
    if (!lower(repository).starts_with(lower(name)) && !lower(short_name).starts_with(lower(name)))
      continue;
    meant.push_back(repository);
    found = entry.path();
  }
  std::sort(known.begin(), known.end());
  std::sort(meant.begin(), meant.end());
  if (!name.empty() && meant.size() == 1) return found;
  if (!name.empty() && meant.size() > 1) {
    throw Error(Fault::usage, {"'" + name + "' is the beginning of several models' names",
                               models.string(), "Name one of them: " + join(meant, ", ") + "."});
  }
  try {
    return find_model_folder(name) / "config.json";
  } catch (const Error&) {
    throw Error(Fault::usage,
                {"no config of a model '" + name + "' is known", models.string(),
                 "Name a folder with a config.json, that file, a repository in the local Hugging "
                 "Face cache, or one that comes with Tailor: " +
                     join(known, ", ") + "."});
  }
}

/// Whether a store was packed from `model`; a model of other tensors is another one.
bool is_made_from(const Store& store, const Checkpoint& model) {
  try {
    return fingerprint(model, store.spec()) == store.fingerprint();
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

int run_model_pack(const ModelPackArguments& arguments) {
  if (arguments.model.empty() == arguments.follow.empty()) {
    throw Error(
        Fault::usage,
        {arguments.model.empty() ? "no model is named" : "MODEL and --follow are both given",
         "the command line of tailor model pack",
         "Give the model's folder or repository, or --follow DIR with the folder its "
         "download fills."});
  }
  if (arguments.delete_source && arguments.follow.empty()) {
    throw Error(Fault::usage, {"--delete-source without --follow", "--delete-source",
                               "Only the shards of a download that is followed are removed."});
  }
  if (arguments.group > 0 && arguments.format != "int4" && arguments.non_expert_format != "int4") {
    throw Error(Fault::usage, {"--group without a format of int4", "--group",
                               "Only int4 has groups: add --format int4, or leave --group out."});
  }
  const auto memory = parse_bytes(arguments.max_ram);
  if (!memory || *memory <= 0) {
    throw Error(Fault::usage, {"'" + arguments.max_ram + "' is not a size", "--max-ram",
                               "Write bytes with a unit, such as 1GiB or 800MB."});
  }
  PackOptions options;
  options.formats = formats_of(arguments.format, arguments.non_expert_format, arguments.group);
  options.source = arguments.follow.empty() ? arguments.model : arguments.follow;
  options.threads = threads_or_all(arguments.threads);
  options.memory_bytes_max = *memory;
  options.follow = !arguments.follow.empty();
  options.delete_source = arguments.delete_source;
  const fs::path model =
      options.follow ? fs::path(arguments.follow) : find_model_folder(arguments.model);
  if (Store::is_store(model)) {
    throw Error(Fault::usage, {"the model is a store already", model.string(),
                               "Pack from the published checkpoint."});
  }
  const Interrupt interrupt;
  options.stop = [&] { return interrupt.asked(); };
  StoreProgress progress;
  options.progress = [&](const PackProgress& at) {
    for (const LayerError& error : at.finished) progress.say(error_text(error));
    progress.show("packing", at.bytes_done, at.bytes_before, at.bytes, at.seconds,
                  at.waiting_for.empty() ? "" : "waiting for " + at.waiting_for);
  };
  const PackReport report = pack_store(model, arguments.to, options);
  double squared = 0, squares = 0, absmax = 0;
  for (const LayerError& error : report.errors) {
    squared += error.squared_error;
    squares += error.squares;
    absmax += error.absmax_squared_error;
  }
  LayerError all;
  all.squared_error = squared;
  all.squares = squares;
  if (arguments.json) {
    Json layers = Json::array();
    for (const LayerError& error : report.errors) {
      layers.push_back(
          {{"layer", error.layer},
           {"experts", error.experts},
           {"relative_error", error.relative()},
           {"mse_over_absmax", error.absmax_squared_error > 0
                                   ? Json(error.squared_error / error.absmax_squared_error)
                                   : Json()}});
    }
    std::cout << Json{{"store", arguments.to},
                      {"bytes", report.bytes},
                      {"units", report.units},
                      {"units_before", report.units_before},
                      {"source_bytes_read", report.source_bytes_read},
                      {"seconds", report.seconds},
                      {"relative_error", squares > 0 ? Json(all.relative()) : Json()},
                      {"mse_over_absmax", absmax > 0 ? Json(squared / absmax) : Json()},
                      {"layers", layers}}
                     .dump(2)
              << "\n";
    return 0;
  }
  if (report.units_before == report.units) {
    std::cout << "This store is complete: " << bytes_text(report.bytes) << " in " << arguments.to
              << "\n";
    return 0;
  }
  std::cout << heading("Packed") << " " << bytes_text(report.bytes) << " into " << arguments.to
            << " in " << seconds_text(report.seconds) << ", reading "
            << bytes_text(report.source_bytes_read) << "\n";
  if (report.units_before > 0) {
    std::cout << "  " << count_text(report.units_before) << " of " << count_text(report.units)
              << " tiles were there from before\n";
  }
  if (squares > 0) {
    std::cout << "  quantisation error " << number_text(100 * all.relative(), 3)
              << " % of the weights (root mean square)";
    if (absmax > 0) {
      std::cout << ", mean square " << number_text(squared / absmax, 3)
                << " x that of scales from the largest value";
    }
    std::cout << "\n";
  }
  std::cout << "  train from it: base_model=" << arguments.to << ", or base.store=" << arguments.to
            << " beside the published model\n";
  return 0;
}

int run_model_verify(const ModelVerifyArguments& arguments) {
  const Store store = Store::open(arguments.store);
  std::optional<Checkpoint> against;
  if (!arguments.against.empty()) {
    against = Checkpoint::open(find_model_folder(arguments.against));
    if (!is_made_from(store, *against)) {
      throw Error(Fault::bad_file,
                  {"the store was made from another model", arguments.store,
                   "It was packed from " + store.source() + "; compare it with that."});
    }
  }
  const Interrupt interrupt;
  StoreProgress progress;
  VerifyOptions options;
  options.threads = threads_or_all(arguments.threads);
  options.against = against ? &*against : nullptr;
  options.stop = [&] { return interrupt.asked(); };
  options.progress = [&](std::int64_t done, std::int64_t bytes, double seconds) {
    progress.show("verifying", done, 0, bytes, seconds, "");
  };
  const VerifyReport report = verify_store(store, options);
  if (arguments.json) {
    std::cout << Json{{"store", arguments.store},  {"good", report.problems.empty()},
                      {"tiles", report.units},     {"bytes", report.bytes},
                      {"seconds", report.seconds}, {"problems", report.problems}}
                     .dump(2)
              << "\n";
  } else {
    std::cout << problems_text(report.problems);
  }
  if (!report.problems.empty()) {
    throw Error(Fault::bad_file,
                {count_text(static_cast<std::int64_t>(report.problems.size())) + " of " +
                     count_text(report.units) + " tiles are not as they were packed",
                 arguments.store, "Check the disk, then pack the model again into a new folder."});
  }
  if (!arguments.json) {
    std::cout << "All " << count_text(report.units) << " tiles (" << bytes_text(report.bytes)
              << ") are as they were packed"
              << (against ? ", and as near the checkpoint as their formats can be" : "")
              << "; read in " << seconds_text(report.seconds) << "\n";
  }
  return 0;
}

int run_model_synthesise(const ModelSynthesiseArguments& arguments) {
  const fs::path path = find_config(arguments.config, recipes_folder() / "models");
  std::error_code error;
  if (!fs::is_regular_file(path, error)) {
    throw Error(Fault::usage, {"config.json is missing", path.string(),
                               "Name the folder of a Hugging Face model."});
  }
  const Json config = read_json(path);
  const ModelSpec spec = model_spec_from_config(config, path.string());
  const std::vector<std::int64_t> layers = choose_layers(spec, arguments.layers);
  SynthesisOptions options;
  options.formats = formats_of(arguments.format, arguments.non_expert_format, arguments.group);
  options.seed = arguments.seed;
  options.threads = threads_or_all(arguments.threads);
  const Interrupt interrupt;
  options.stop = [&] { return interrupt.asked(); };
  StoreProgress progress;
  options.progress = [&](const SynthesisProgress& at) {
    progress.show("writing", at.bytes_done, at.bytes_before, at.bytes, at.seconds, "");
  };
  const SynthesisReport report = synthesise_store(config, layers, arguments.to, options);
  if (arguments.json) {
    std::cout << Json{{"store", arguments.to},    {"bytes", report.bytes},
                      {"units", report.units},    {"units_before", report.units_before},
                      {"layers", layers},         {"seed", options.seed},
                      {"seconds", report.seconds}}
                     .dump(2)
              << "\n";
    return 0;
  }
  std::cout << heading("Wrote") << " " << bytes_text(report.bytes) << " of random weights into "
            << arguments.to << " in " << seconds_text(report.seconds) << "\n";
  if (report.units_before > 0) {
    std::cout << "  " << count_text(report.units_before) << " of " << count_text(report.units)
              << " tiles were there from before\n";
  }
  std::cout << "  " << layers.size() << " of " << spec.layer_count()
            << " layers; there is no tokenizer in it: train from it with tokenised data\n";
  return 0;
}

}  // namespace tailor
