#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "adapters/lora.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"
#include "base/units.h"
#include "data/runs/table.h"
#include "data/tokens/token_store.h"
#include "recipes/expert_report.h"
#include "recipes/scalars.h"
#include "tools/compute/make_adapter.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/planning.h"
#include "tools/recipe_inputs.h"
#include "tools/terminal.h"
#include "trainer/routing_counts.h"

namespace tailor {
namespace {

constexpr double kTopP = 0.2;  // of the ESFT paper's experiments by token

/// Leaves the first rows of a batch of one micro-batch, `tokens` in all.
void keep_tokens(Batch& batch, std::int64_t tokens) {
  const auto end = static_cast<std::int32_t>(tokens);
  for (auto* column : {&batch.ids, &batch.position, &batch.target}) {
    column->resize(static_cast<std::size_t>(tokens));
  }
  batch.token_id.resize(static_cast<std::size_t>(tokens));
  for (auto* starts : {&batch.document_start, &batch.micro_batch_start}) {
    std::erase_if(*starts, [&](std::int32_t start) { return start >= end; });
    starts->push_back(end);
  }
}

/// One scan from its arguments to its files. Members in the order they come to be.
class Scan {
 public:
  explicit Scan(const ExpertsScanArguments& arguments)
      : arguments_(arguments), began_(seconds_now()) {
    check_arguments();
    read_recipe();
    find_price();
    folder_ = find_model_folder(arguments.model.empty() ? resolved_->file.recipe.base_model
                                                        : arguments.model);
    const fs::path store = recipe_store_or_empty();
    model_ = read_routed_model(store.empty() ? folder_ : store);
    if (model_.moe_layers.empty()) {
      throw Error(Fault::usage, {"the model has no routed experts", folder_.string(),
                                 "Scan a mixture-of-experts model."});
    }
  }

  int go() {
    const ExpertLoad load = count();
    choose(load);
    write(load);
    if (arguments_.json) {
      std::printf("%s\n", json(load).dump().c_str());
    } else {
      print(load);
    }
    return 0;
  }

 private:
  [[noreturn]] static void refuse(const std::string& what, const std::string& where,
                                  const std::string& mend) {
    throw Error(Fault::usage, {what, where, mend});
  }

  /// Everything that can be wrong before a file is read.
  void check_arguments() {
    const ExpertsScanArguments& a = arguments_;
    require_cpu(a.device, "--device");
    compute_type(a.dtype);
    if (a.recipe.empty()) {
      if (!a.overrides.empty()) {
        refuse("'" + a.overrides.front() + "' without --recipe", "the command line",
               "key=value changes a recipe: name it with --recipe.");
      }
      if (a.model.empty() || a.data.empty()) {
        refuse(std::string(a.model.empty() ? "--model" : "--data") + " is required",
               "the command line", "Give --model and --data, or --recipe, which has both.");
      }
    }
    const int rules =
        (a.top_p ? 1 : 0) + (a.count ? 1 : 0) + (a.max_bytes ? 1 : 0) + (a.max_usd ? 1 : 0);
    if (rules > 1) {
      refuse("experts are to be chosen by more than one rule", "the command line",
             "Give one of --top-p, --count, --max-bytes, --max-usd.");
    }
    if (a.top_p && !(*a.top_p > 0 && *a.top_p <= 1)) {
      refuse("--top-p is " + exact_text(*a.top_p) + ", it must be above 0 and at most 1",
             "the command line", "Give a share, such as 0.5; 1 takes every expert in use.");
    }
    if (a.max_bytes) {
      const auto bytes = parse_bytes(*a.max_bytes);
      if (!bytes) {
        refuse("--max-bytes is '" + *a.max_bytes + "', a size is needed", "the command line",
               "Write it as 500MB, 2GiB or a number of bytes.");
      }
      max_bytes_ = *bytes;
    }
    if (a.max_usd) {
      const auto micros = parse_micros(*a.max_usd);
      if (!micros || *micros == 0) {
        refuse("--max-usd is '" + *a.max_usd + "', an amount above 0 is needed", "the command line",
               "Write dollars, such as 2.50.");
      }
      max_usd_micros_ = *micros;
      if (a.recipe.empty()) {
        refuse("--max-usd without --recipe", "the command line",
               "What a run costs follows from its recipe: name it with --recipe.");
      }
    }
    for (const std::string& path : {a.out, a.report}) {
      std::error_code error;
      if (path.empty() || a.force || !fs::exists(path, error)) continue;
      refuse("there is a file already", path, "Name another one, or add --force to replace it.");
    }
    if (!a.out.empty() && a.out == a.report) {
      refuse("--out and --report are one file", a.out, "Name two.");
    }
  }

  void read_recipe() {
    if (arguments_.recipe.empty()) return;
    RecipeFile file = open_recipe(arguments_.recipe, arguments_.overrides);
    // The selection it names may be the one this scan is to write.
    file.recipe.lora.experts.reset();
    if (!arguments_.model.empty()) {
      file.recipe.base_model = arguments_.model;
      file.recipe.base.store.reset();
    }
    if (arguments_.expert_rank) {
      file.recipe.lora.expert_rank = narrow<int>(*arguments_.expert_rank);
    }
    resolved_ = resolve_recipe(std::move(file));
  }

  void find_price() {
    if (recipe() == nullptr) return;
    const PriceQuote price = recipe_price(*recipe(), recipe_machine(*recipe()));
    if (price.usd_micros_per_device_hour) {
      usd_micros_per_hour_ = static_cast<double>(*price.usd_micros_per_device_hour);
    }
  }
  /// Of the scan so far, everything before the first row included; nothing without a price.
  std::string spent_text() const {
    if (!usd_micros_per_hour_) return {};
    return "  " + usd_text(std::llround((seconds_now() - began_) / 3600 * *usd_micros_per_hour_));
  }

  const Recipe* recipe() const { return resolved_ ? &resolved_->file.recipe : nullptr; }
  fs::path recipe_store_or_empty() const {
    return recipe() == nullptr ? fs::path() : recipe_store(*recipe());
  }

  DataOptions data_of_scan() const {
    const ExpertsScanArguments& a = arguments_;
    DataOptions data;
    if (recipe() != nullptr) {
      data = data_options(*recipe());
    } else {
      data.packing = false;  // one document a row, in file order
      data.cache = cache_folder();
    }
    if (!a.data.empty()) {
      data.train.clear();
      for (const std::string& path : a.data) data.train.push_back({path, 1.0, std::nullopt});
      data.validation.clear();
      data.validation_split = 0;
      data.store.reset();
    }
    if (a.format) data.format = record_format_from_name(*a.format);
    if (a.chat_template) data.chat_template = *a.chat_template;
    if (a.train_on) data.train_on = TrainOn::from_name(*a.train_on);
    if (a.sequence_len) data.sequence_len = *a.sequence_len;
    return data;
  }

  /// Where the recipe's base is streamed from, so that a model that must be is.
  BaseRequest base_of_scan() const {
    BaseRequest out;
    if (recipe() == nullptr) return out;
    const BaseRecipe& base = recipe()->base;
    out.model_name = recipe()->base_model;
    out.store = recipe_store(*recipe());
    out.formats = store_formats(base);
    out.pack = out.store.empty() &&
               (base.format != BaseFormat::as_is || base.non_expert_format != BaseFormat::as_is);
    out.device_bytes = base.device_memory;
    out.host_bytes = base.host_memory;
    return out;
  }

  ExpertLoad count() {
    set_threads(arguments_.threads);
    const DataOptions data = data_of_scan();
    for (const DataFile& file : data.train) selection_.data.push_back(file.path);
    const ModelSpec spec =
        Store::is_store(folder_) ? Store::open(folder_).spec() : read_model_spec(folder_);
    const PrepareReport prepared =
        prepare_data(data, model_tokenizer(folder_, spec.vocab), spec.vocab);
    release_free_memory();
    const auto store = std::make_shared<const TokenStore>(TokenStore::open(prepared.train.store));
    each_expert_bytes_ = expert_bytes(spec);
    OpenedModel model = open_model(folder_, compute_type(arguments_.dtype), base_of_scan());
    const std::int64_t rows = std::min(store->rows(), arguments_.limit.value_or(store->rows()));
    const double mean = static_cast<double>(store->tokens()) / static_cast<double>(store->rows());
    const auto rows_per_pass = std::clamp<std::int64_t>(
        static_cast<std::int64_t>(static_cast<double>(arguments_.batch_tokens) / mean), 1, rows);
    const CountedTokens counted =
        arguments_.count_tokens == "trained" ? CountedTokens::trained : CountedTokens::all;

    ExpertLoad load = empty_load(spec);
    ProgressLine line(true);
    const double began = seconds_now();
    std::int64_t tokens = 0;
    const EvaluationSource source(store, rows_per_pass, rows_per_pass);
    for (std::int64_t first = 0; first < rows; first += rows_per_pass) {
      const std::int64_t last = std::min(rows, first + rows_per_pass);
      Batch batch = source.batch_at(first / rows_per_pass, 0, 1);
      const auto starts = store->row_start();
      keep_tokens(batch,
                  starts[static_cast<std::size_t>(last)] - starts[static_cast<std::size_t>(first)]);
      count_routing(*model.decoder, batch, counted, last < rows, load);
      tokens += batch.tokens();
      const double spent = seconds_now() - began;
      const std::string text =
          "scanned " + count_text(last) + " of " + count_text(rows) + " rows  " +
          number_text(static_cast<double>(tokens) / spent, 3) + " tokens/s  ETA " +
          seconds_text(spent * static_cast<double>(rows - last) / static_cast<double>(last)) +
          spent_text();
      last < rows ? line.show(text) : line.say(text);
    }
    seconds_ = seconds_now() - began;
    if (load.tokens == 0) {
      throw Error(Fault::bad_file,
                  {"no token of the data is counted", prepared.train.store.string(),
                   "Scan more rows, or with --count-tokens all."});
    }
    return load;
  }

  /// Of one routed expert's factors, float32, as training lays them out.
  std::int64_t expert_bytes(const ModelSpec& spec) {
    LoraOptions options;
    if (recipe() != nullptr) options = lora_options(recipe()->lora);
    const std::int64_t rank = arguments_.expert_rank.value_or(
        recipe() != nullptr
            ? recipe()->lora.expert_rank.value_or(1)
            : std::max<std::int64_t>(1, LoraRecipe().rank / spec.experts_per_token));
    options.expert_rank = rank;
    const auto of_targets = [&](std::vector<std::string> targets) {
      options.targets = std::move(targets);
      std::int64_t bytes = 0;
      for (const LoraSite& site : choose_sites(spec, options)) {
        const bool counts = site.is_experts() && site.layer == model_.moe_layers.front();
        if (counts) bytes += site.rank * (site.in + site.out) * 4;
      }
      return bytes;
    };
    selection_.expert_rank = rank;
    const std::int64_t bytes = recipe() != nullptr ? of_targets(options.targets) : 0;
    return bytes > 0 ? bytes : of_targets({"experts"});
  }

  void choose(const ExpertLoad& load) {
    const ExpertsScanArguments& a = arguments_;
    const ExpertScore by = a.by == "gate" ? ExpertScore::gate : ExpertScore::token;
    ChosenExperts chosen;
    if (a.count) {
      selection_.rule = "count";
      selection_.value = static_cast<double>(*a.count);
      chosen = choose_count(load, by, *a.count);
    } else if (max_bytes_) {
      selection_.rule = "max_bytes";
      selection_.value = static_cast<double>(*max_bytes_);
      chosen = choose_total(load, by, *max_bytes_ / each_expert_bytes_);
      if (count_experts(chosen) == 0) {
        refuse("--max-bytes is " + bytes_text(*max_bytes_) + ", one expert's factors take " +
                   bytes_text(each_expert_bytes_),
               "the command line", "Give more bytes, or lower --expert-rank.");
      }
    } else if (max_usd_micros_) {
      selection_.rule = "max_usd";
      selection_.value = static_cast<double>(*max_usd_micros_) / 1e6;
      chosen = choose_by_cost(load, by);
    } else {
      selection_.rule = "top_p";
      selection_.value = a.top_p.value_or(kTopP);
      chosen = choose_top_p(load, by, selection_.value);
    }
    selection_.model_name = a.model.empty() ? resolved_->file.recipe.base_model : a.model;
    selection_.model = model_;
    selection_.counted = a.count_tokens;
    selection_.tokens = load.tokens;
    selection_.by = a.by;
    for (std::size_t l = 0; l < load.layers.size(); ++l) {
      const Coverage share = coverage(load.layers[l], chosen[l]);
      selection_.layers.push_back({load.layers[l].layer, chosen[l], share.tokens, share.gate});
    }
    selection_.bytes = count_experts(chosen) * each_expert_bytes_;
  }

  /// The largest greedy choice with which `tailor plan` prices the recipe's run at the cap or
  /// below. More experts never make a run cheaper, so halving finds it.
  ChosenExperts choose_by_cost(const ExpertLoad& load, ExpertScore by) {
    ResolvedRecipe planned = *resolved_;
    const std::optional<DataStats> data = data_stats(planned.file.recipe, CountData::for_steps);
    const auto usd_micros = [&](const ChosenExperts& chosen) {
      double tokens = 0;
      for (std::size_t l = 0; l < chosen.size(); ++l) {
        tokens += coverage(load.layers[l], chosen[l]).tokens;
      }
      planned.file.recipe.lora.chosen_experts = {count_experts(chosen),
                                                 tokens / static_cast<double>(chosen.size())};
      const Plan plan = plan_recipe(planned, data, Measure::once).plan;
      if (!plan.usd.value) {
        refuse("--max-usd needs a plan with a price", planned.file.recipe.name,
               "The plan has none: " + plan.usd.working + ".");
      }
      return *plan.usd.value * 1e6;
    };
    const auto cap = static_cast<double>(*max_usd_micros_);
    std::int64_t most = count_experts(choose_total(load, by, std::numeric_limits<int>::max()));
    std::int64_t good = 0;
    if (usd_micros(choose_total(load, by, most)) <= cap) {
      log_info("every expert in use costs no more than --max-usd");
      return choose_total(load, by, most);
    }
    const double least = usd_micros(choose_total(load, by, 1));
    if (least > cap) {
      refuse("--max-usd is " + usd_text(*max_usd_micros_) + ", the run is planned at " +
                 usd_text(std::llround(least)) + " with a single expert",
             planned.file.recipe.name,
             "Most of a run's cost is in the frozen weights and the other factors: allow more, or "
             "shorten the run (training.max_steps).");
    }
    for (good = 1; most - good > 1;) {
      const std::int64_t middle = good + (most - good) / 2;
      (usd_micros(choose_total(load, by, middle)) <= cap ? good : most) = middle;
    }
    return choose_total(load, by, good);
  }

  void write(const ExpertLoad& load) const {
    if (!arguments_.out.empty()) {
      write_atomically(arguments_.out, selection_text(selection_));
      log_info("wrote " + arguments_.out + ": lora.experts=" + arguments_.out + " uses it");
    }
    if (!arguments_.report.empty()) {
      write_atomically(arguments_.report, expert_report_html(load, selection_));
      log_info("wrote " + arguments_.report);
    }
  }

  Json json(const ExpertLoad& load) const {
    Json out = {{"model", folder_.string()},
                {"tokens", load.tokens},
                {"counted", selection_.counted},
                {"by", selection_.by},
                {"rule", selection_.rule},
                {"value", selection_.value},
                {"expert_rank", selection_.expert_rank},
                {"experts", selection_.expert_count()},
                {"bytes", selection_.bytes},
                {"tokens_covered", selection_.tokens_covered()},
                {"out", arguments_.out.empty() ? Json() : Json(arguments_.out)},
                {"report", arguments_.report.empty() ? Json() : Json(arguments_.report)},
                {"seconds", seconds_},
                {"layers", Json::array()}};
    const std::vector<LayerSummary> rows = summarise(load, selection_);
    for (std::size_t l = 0; l < rows.size(); ++l) {
      const LayerSummary& row = rows[l];
      out["layers"].push_back({{"layer", row.layer},
                               {"top_expert", row.top_expert < 0 ? Json() : Json(row.top_expert)},
                               {"top_share", row.top_share},
                               {"effective_experts", row.effective_experts},
                               {"chosen", selection_.layers[l].experts},
                               {"tokens_covered", row.tokens_covered},
                               {"gate_covered", row.gate_covered},
                               {"bytes", row.bytes},
                               {"tokens", load.layers[l].tokens},
                               {"gate", load.layers[l].gate}});
    }
    return out;
  }

  void print(const ExpertLoad& load) const {
    TextTable table({">layer", ">top expert", ">its share", ">effective experts", ">chosen",
                     ">choices covered", ">gate covered", ">factors", "experts"});
    constexpr std::size_t kListed = 40;
    const auto percent = [](double share) { return fixed_text(100 * share, 1) + " %"; };
    const std::vector<LayerSummary> rows = summarise(load, selection_);
    for (std::size_t l = 0; l < rows.size(); ++l) {
      const LayerSummary& row = rows[l];
      std::string experts = runs_text(selection_.layers[l].experts);
      if (experts.size() > kListed) experts = experts.substr(0, kListed - 3) + "...";
      table.add({std::to_string(row.layer),
                 row.top_expert < 0 ? "-" : std::to_string(row.top_expert), percent(row.top_share),
                 number_text(row.effective_experts, 3), std::to_string(row.chosen),
                 percent(row.tokens_covered), percent(row.gate_covered), bytes_text(row.bytes),
                 experts});
    }
    std::printf("%s\n%s tokens (%s), shares by %s\n", table.text().c_str(),
                count_text(load.tokens).c_str(), selection_.counted.c_str(),
                selection_.by == "gate" ? "gate weight" : "choices");
    std::printf("%s of %s experts chosen (%s %s): %s of all choices, %s of factors at rank %lld\n",
                count_text(selection_.expert_count()).c_str(),
                count_text(model_.experts * static_cast<std::int64_t>(rows.size())).c_str(),
                selection_.rule.c_str(), exact_text(selection_.value).c_str(),
                percent(selection_.tokens_covered()).c_str(), bytes_text(selection_.bytes).c_str(),
                static_cast<long long>(selection_.expert_rank));
  }

  const ExpertsScanArguments& arguments_;
  double began_;
  std::optional<double> usd_micros_per_hour_;  ///< of the device that scans
  std::optional<std::int64_t> max_bytes_, max_usd_micros_;
  std::optional<ResolvedRecipe> resolved_;
  fs::path folder_;
  RoutedModel model_;
  std::int64_t each_expert_bytes_ = 0;
  ExpertSelection selection_;
  double seconds_ = 0;
};

}  // namespace

int run_experts_scan(const ExpertsScanArguments& arguments) { return Scan(arguments).go(); }

}  // namespace tailor
