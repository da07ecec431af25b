#include <algorithm>
#include <iostream>
#include <map>
#include <set>

#include "adapters/inspect.h"
#include "adapters/peft_reader.h"
#include "adapters/serving.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "tools/adapter_base.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

/// Whether an adapter fits a base, and why not.
struct Fit {
  AdapterBase base;
  bool fits = false;
  std::string problem, mend;
  std::optional<bool> trained_on_it;  ///< unknown where the adapter or the weights do not say
};

Fit fit_of(const PeftFolder& folder, const std::string& base) {
  Fit out;
  out.base = find_adapter_base(base);
  try {
    const PeftReader reader(folder.file_path().parent_path(), out.base.spec);
    out.fits = true;
  } catch (const Error& problem) {
    if (problem.fault() != Fault::bad_file) throw;
    out.problem = problem.parts().what;
    out.mend = problem.parts().mend;
  }
  const std::string trained_on = folder.base_fingerprint();
  if (!trained_on.empty() && !out.base.fingerprint.empty())
    out.trained_on_it = trained_on == out.base.fingerprint;
  return out;
}

std::string fit_text(const Fit& fit) {
  const std::string where = fit.base.folder.string();
  if (!fit.fits) return where + ": no, " + fit.problem;
  if (!fit.trained_on_it) {
    return where + ": yes, by names and shapes; " +
           (fit.base.fingerprint.empty()
                ? "its weights are not here"
                : "the adapter does not say which weights it was trained on");
  }
  return where + (*fit.trained_on_it
                      ? ": yes, it was trained on these weights"
                      : ": by names and shapes; but it was trained on other weights");
}

/// A kind of matrix over all layers.
struct Target {
  std::set<std::int64_t> ranks;
  std::set<double> scales;
  std::int64_t layers = 0, parameters = 0, experts = 1, experts_used = 0, matrices = 0;
  double squares = 0, largest = -1;
  int largest_layer = 0;
  std::map<int, double> norm;  ///< by layer
};

struct Inspected {
  std::vector<AdaptedMatrix> matrices;
  std::vector<ChangeOfMatrix> changes;  ///< of each
  std::vector<std::string> order;       ///< of targets
  std::map<std::string, Target> targets;
  int layers = 0;
  std::int64_t parameters = 0;
};

Inspected inspect(std::vector<AdaptedMatrix> matrices) {
  Inspected out;
  out.matrices = std::move(matrices);
  for (const AdaptedMatrix& matrix : out.matrices) {
    const ChangeOfMatrix change = change_of(matrix);
    out.changes.push_back(change);
    out.layers = std::max(out.layers, matrix.layer + 1);
    out.parameters += matrix.parameters;
    if (!out.targets.contains(matrix.target)) out.order.push_back(matrix.target);
    Target& target = out.targets[matrix.target];
    target.ranks.insert(matrix.rank);
    target.scales.insert(matrix.scale);
    ++target.layers;
    target.parameters += matrix.parameters;
    target.experts = std::max(target.experts, matrix.experts);
    target.matrices += matrix.experts;
    target.experts_used += change.experts_used;
    target.squares += change.norm * change.norm;
    target.norm[matrix.layer] = change.norm;
    if (change.norm > target.largest) {
      target.largest = change.norm;
      target.largest_layer = matrix.layer;
    }
  }
  return out;
}

template <class Set>
std::string set_text(const Set& values) {
  std::vector<std::string> words;
  for (const auto& value : values) words.push_back(exact_text(static_cast<double>(value)));
  if (words.size() > 3) return words.front() + " to " + words.back();
  return join(words, ", ");
}

Json finite(double value) { return std::isfinite(value) ? Json(value) : Json(); }

Json fit_json(const Fit& fit) {
  return {{"base", fit.base.folder.string()},
          {"fits", fit.fits},
          {"trained_on_it", fit.trained_on_it ? Json(*fit.trained_on_it) : Json()},
          {"problem", fit.problem.empty() ? Json() : Json(fit.problem)}};
}

Json difference_json(const AdapterDifference& difference, const std::string& against) {
  Json modules = Json::array();
  for (const AdapterDifference::Matrix& matrix : difference.matrices) {
    modules.push_back({{"module", matrix.module},
                       {"cosine", matrix.cosine},
                       {"relative_difference", finite(matrix.relative)},
                       {"change", matrix.norm_here},
                       {"change_there", matrix.norm_there}});
  }
  return {{"folder", against},
          {"cosine", difference.cosine},
          {"relative_difference", finite(difference.relative)},
          {"modules", modules},
          {"only_here", difference.only_here},
          {"only_there", difference.only_there}};
}

Json to_json(const PeftFolder& folder, const Inspected& inspected) {
  const PeftConfig& config = folder.config();
  Json targets = Json::array(), modules = Json::array();
  for (const std::string& name : inspected.order) {
    const Target& target = inspected.targets.at(name);
    targets.push_back({{"target", name},
                       {"layers", target.layers},
                       {"ranks", target.ranks},
                       {"scales", target.scales},
                       {"parameters", target.parameters},
                       {"experts", target.experts},
                       {"matrices", target.matrices},
                       {"matrices_changed", target.experts_used},
                       {"change", std::sqrt(target.squares)}});
  }
  for (std::size_t i = 0; i < inspected.matrices.size(); ++i) {
    const AdaptedMatrix& matrix = inspected.matrices[i];
    modules.push_back({{"module", matrix.module},
                       {"target", matrix.target},
                       {"layer", matrix.layer < 0 ? Json() : Json(matrix.layer)},
                       {"experts", matrix.experts},
                       {"experts_changed", inspected.changes[i].experts_used},
                       {"rank", matrix.rank},
                       {"alpha", matrix.alpha},
                       {"scale", matrix.scale},
                       {"parameters", matrix.parameters},
                       {"change", inspected.changes[i].norm}});
  }
  return {{"folder", folder.file_path().parent_path().string()},
          {"base_model", config.base_model.empty() ? Json() : Json(config.base_model)},
          {"base_fingerprint",
           folder.base_fingerprint().empty() ? Json() : Json(folder.base_fingerprint())},
          {"peft_version", config.version.empty() ? Json() : Json(config.version)},
          {"bytes", folder.file_bytes()},
          {"dtypes", folder.dtypes()},
          {"parameters", inspected.parameters},
          {"rank", config.rank},
          {"alpha", config.alpha},
          {"rslora", config.rslora},
          {"targets", targets},
          {"modules", modules}};
}

std::string change_text(double norm) { return number_text(norm, 3); }

void print(const PeftFolder& folder, const Inspected& inspected, const std::optional<Fit>& fit,
           std::ostream& out) {
  const PeftConfig& config = folder.config();
  out << heading("adapter") << " in " << folder.file_path().parent_path().string() << "\n";
  TextTable table({"", ""});
  table.add({"base", config.base_model.empty() ? "not said" : config.base_model});
  if (fit) table.add({"fits", fit_text(*fit)});
  const std::set<std::string> dtypes = folder.dtypes();
  table.add({"factors", bytes_text(folder.file_bytes()) + ", " +
                            join(std::vector<std::string>(dtypes.begin(), dtypes.end()), ", ") +
                            ", " + count_text(inspected.parameters) + " parameters"});
  table.add({"rank, alpha", std::to_string(config.rank) + ", " + exact_text(config.alpha) +
                                (config.rslora ? ", rsLoRA" : "")});
  table.add({"layout", config.version.empty() ? "of an unknown PEFT" : "PEFT " + config.version});
  out << rows_text(table, "  ") << "\n";
  TextTable targets(
      {"target", ">layers", ">rank", ">scale", ">parameters", ">changed", ">change", "largest in"});
  for (const std::string& name : inspected.order) {
    const Target& target = inspected.targets.at(name);
    targets.add({name, count_text(target.layers), set_text(target.ranks), set_text(target.scales),
                 count_text(target.parameters),
                 count_text(target.experts_used) + " of " + count_text(target.matrices),
                 change_text(std::sqrt(target.squares)),
                 target.largest > 0 ? "layer " + std::to_string(target.largest_layer) + ": " +
                                          change_text(target.largest)
                                    : "none"});
  }
  out << targets.text("  ");
  if (inspected.layers == 0) return;
  out << "\n"
      << heading("change by layer") << ", the norm of scale B A; each line to its largest\n";
  std::size_t widest = 0;
  for (const std::string& name : inspected.order) widest = std::max(widest, name.size());
  std::string ruler;
  for (int layer = 0; layer < inspected.layers; layer += 10) {
    std::string mark = std::to_string(layer);
    mark.resize(10, ' ');
    ruler += mark;
  }
  out << "  " << std::string(widest + 2, ' ') << trim(ruler) << "\n";
  for (const std::string& name : inspected.order) {
    const Target& target = inspected.targets.at(name);
    std::vector<double> values(static_cast<std::size_t>(inspected.layers), -1);
    for (const auto& [layer, norm] : target.norm) {
      if (layer >= 0) values[static_cast<std::size_t>(layer)] = norm;
    }
    out << "  " << name << std::string(widest + 2 - name.size(), ' ') << bars(values) << "\n";
  }
}

std::string listed(const std::vector<std::string>& modules) {
  constexpr std::size_t kShown = 5;
  std::vector<std::string> shown(
      modules.begin(),
      modules.begin() + static_cast<std::ptrdiff_t>(std::min(kShown, modules.size())));
  const std::size_t more = modules.size() - shown.size();
  return join(shown, ", ") +
         (more > 0 ? " and " + count_text(static_cast<std::int64_t>(more)) + " more" : "");
}

void print(const AdapterDifference& difference, const std::string& against, std::ostream& out) {
  out << "\n" << heading("against") << " " << against << "\n";
  TextTable table({"module", ">cosine", ">difference", ">change", ">there"});
  for (const AdapterDifference::Matrix& matrix : difference.matrices) {
    table.add({matrix.module, number_text(matrix.cosine, 4),
               std::isfinite(matrix.relative) ? number_text(matrix.relative, 3) : "all",
               change_text(matrix.norm_here), change_text(matrix.norm_there)});
  }
  table.add({"all", number_text(difference.cosine, 4),
             std::isfinite(difference.relative) ? number_text(difference.relative, 3) : "all", "",
             ""});
  out << table.text("  ");
  if (!difference.only_here.empty()) out << "  only here: " << listed(difference.only_here) << "\n";
  if (!difference.only_there.empty())
    out << "  only there: " << listed(difference.only_there) << "\n";
}

/// The base that an export follows: --base, else the one the adapter names.
AdapterBase export_base(const PeftFolder& folder, const AdapterExportArguments& arguments) {
  const std::string& named = folder.config().base_model;
  std::optional<AdapterBase> base;
  if (!arguments.base.empty()) {
    base = find_adapter_base(arguments.base);
  } else {
    base = recorded_base(named);
  }
  if (!base) {
    throw Error(Fault::usage,
                {named.empty() ? "the adapter does not name its base model"
                               : "the adapter's base model '" + named + "' is not here",
                 arguments.adapter,
                 "Name it with --base: a folder, a store, a config.json alone, or a repository "
                 "in the local Hugging Face cache. Its weights are not needed."});
  }
  const std::string trained_on = folder.base_fingerprint();
  if (!trained_on.empty() && !base->fingerprint.empty() && trained_on != base->fingerprint) {
    throw Error(Fault::bad_file,
                {"the adapter was trained on other weights than those in " + base->folder.string(),
                 arguments.adapter,
                 "Name the model it was trained on with --base; a config.json alone is enough, and "
                 "then nothing is compared."});
  }
  return *base;
}

/// The command line that serves an exported adapter; empty for PEFT.
std::string serve_command(const ServingOptions& options, const AdapterExportArguments& arguments,
                          const AdapterBase& base, const ServingReport& report) {
  const std::string model =
      fs::is_directory(base.folder) ? base.folder.string() : std::string("MODEL");
  if (options.target.server == Server::sglang) {
    return "python -m sglang.launch_server --model-path " + model +
           " --enable-lora --lora-paths tailored=" + arguments.to;
  }
  if (options.target.server != Server::vllm) return "";
  std::int64_t rank = 8;  // the ranks vLLM takes
  for (const std::int64_t next : {8, 16, 32, 64, 128, 256, 320, 512}) {
    rank = next;
    if (rank >= report.rank) break;
  }
  return "vllm serve " + model + " --enable-lora --max-lora-rank " + std::to_string(rank) +
         " --lora-modules tailored=" + arguments.to;
}

}  // namespace

int run_adapter_inspect(const AdapterInspectArguments& arguments) {
  const PeftFolder folder(arguments.adapter);
  folder.check_finite();
  const Inspected inspected = inspect(matrices_as_stored(folder));
  std::optional<Fit> fit;
  if (!arguments.base.empty()) fit = fit_of(folder, arguments.base);
  std::optional<AdapterDifference> difference;
  if (!arguments.against.empty()) {
    const PeftFolder other(arguments.against);
    other.check_finite();
    std::optional<AdapterBase> base;
    if (fit) base = fit->base;
    if (!base) base = recorded_base(folder.config().base_model);
    if (base) {
      // Layouts may differ: both as the model has them.
      const PeftReader here(arguments.adapter, base->spec), there(arguments.against, base->spec);
      difference = compare(matrices_of_model(here), matrices_of_model(there), arguments.against);
    } else {
      difference =
          compare(matrices_as_stored(folder), matrices_as_stored(other), arguments.against);
    }
  }
  if (arguments.json) {
    Json out = to_json(folder, inspected);
    out["fit"] = fit ? fit_json(*fit) : Json();
    out["against"] = difference ? difference_json(*difference, arguments.against) : Json();
    std::cout << out.dump(2) << "\n";
  } else {
    print(folder, inspected, fit, std::cout);
    if (difference) print(*difference, arguments.against, std::cout);
  }
  if (fit && !fit->fits) {
    std::cout.flush();
    throw Error(Fault::bad_file,
                {"the adapter does not fit " + fit->base.folder.string() + ": " + fit->problem,
                 arguments.adapter, fit->mend});
  }
  return 0;
}

int run_adapter_export(const AdapterExportArguments& arguments) {
  ServingOptions options;
  options.target = serving_target_from_text(arguments.target);
  options.uniform = arguments.uniform_rank;
  options.dtype = arguments.dtype == "bfloat16" ? Dtype::bf16 : Dtype::f32;
  if (options.uniform && options.target.server != Server::peft) {
    throw Error(Fault::usage, {"--uniform-rank with --for " + arguments.target, "--uniform-rank",
                               "Servers always get one rank: leave it out."});
  }
  const PeftFolder folder(arguments.adapter);
  const AdapterBase base = export_base(folder, arguments);
  const PeftReader reader(arguments.adapter, base.spec);
  options.module_prefix = base.prefix;
  options.base_model = folder.config().base_model.empty() ? arguments.base : "";
  const double began = seconds_now();
  ProgressLine line;
  options.progress = [&](std::int64_t done, std::int64_t bytes) {
    const auto share = static_cast<double>(done) / static_cast<double>(bytes);
    std::string text = "exporting " + number_text(100 * share, 3) + " %";
    const double seconds = seconds_now() - began;
    if (seconds > 1) text += ", " + seconds_text(seconds / share - seconds) + " to go";
    line.show(text);
  };
  const ServingReport report = export_adapter(reader, base.spec, options, arguments.to);
  line.show("");
  const std::string command = serve_command(options, arguments, base, report);
  if (arguments.json) {
    std::cout << Json{{"folder", arguments.to},
                      {"adapter", arguments.adapter},
                      {"for", arguments.target},
                      {"base", base.folder.string()},
                      {"layout", report.layout.empty() ? Json() : Json(report.layout)},
                      {"rank", report.rank},
                      {"alpha", report.alpha},
                      {"tensors", report.tensors},
                      {"bytes", report.bytes},
                      {"notes", report.notes},
                      {"command", command.empty() ? Json() : Json(command)},
                      {"seconds", seconds_now() - began}}
                     .dump(2)
              << "\n";
    return 0;
  }
  std::cout << heading("Exported") << " " << bytes_text(report.bytes) << " into " << arguments.to
            << " for " << arguments.target << ": rank " << report.rank << ", alpha "
            << exact_text(report.alpha) << ", " << count_text(report.tensors) << " tensors"
            << (report.layout.empty() ? "" : ", experts " + report.layout) << "\n";
  for (const std::string& note : report.notes) std::cout << "  " << note << "\n";
  if (!command.empty()) std::cout << "  serve it with: " << command << "\n";
  return 0;
}

}  // namespace tailor
