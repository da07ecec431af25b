#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>

#include "adapters/base_record.h"
#include "adapters/peft_files.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"
#include "base/url.h"
#include "data/runs/metrics.h"
#include "data/runs/report.h"
#include "data/runs/run_folder.h"
#include "data/store/fingerprint.h"
#include "data/tokens/token_store.h"
#include "recipes/choices.h"
#include "recipes/machine.h"
#include "recipes/model_facts.h"
#include "recipes/plan.h"
#include "recipes/schema.h"
#include "recipes/write.h"
#include "tools/compute/make_adapter.h"
#include "tools/compute/progress.h"
#include "tools/compute/run_books.h"
#include "tools/compute/run_ranks.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/interrupt.h"
#include "tools/planning.h"
#include "trainer/run_state.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

/// Why a run's loop ended.
enum class Ending { finished, interrupted, budget };

Schedule make_schedule(const TrainingRecipe& recipe, std::int64_t steps) {
  Schedule out;
  out.kind = recipe.lr_scheduler == LrScheduler::constant ? ScheduleKind::constant
             : recipe.lr_scheduler == LrScheduler::linear ? ScheduleKind::linear
                                                          : ScheduleKind::cosine;
  out.learning_rate = recipe.learning_rate;
  out.steps = steps;
  out.warmup_steps = recipe.warmup_steps
                         ? *recipe.warmup_steps
                         : static_cast<std::int64_t>(std::ceil(recipe.warmup_ratio.value_or(0) *
                                                               static_cast<double>(steps)));
  return out;
}

/// One run from its recipe to its report, on one rank of it; see run_train. Members in the order
/// they come to be.
class Run {
 public:
  explicit Run(const TrainArguments& arguments)
      : arguments_(arguments), began_steady_ms_(clock_.steady_ms()) {
    file_ = open_recipe(arguments.recipe, arguments.overrides);
    refuse_unsupported(recipe());
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() {
    std::error_code ignored;
    if (!scratch_.empty()) fs::remove(scratch_, ignored);
  }

  int go() {
    ranks_ = std::make_unique<RunRanks>();
    const int code = ranks_->run([&] { return run(); });
    if (stopped_) throw *stopped_;
    return code;
  }

 private:
  const Recipe& recipe() const { return file_.recipe; }

  int run() {
    take_ranks();
    ranks_->doing("preparing");
    prepare_inputs();
    open_folder();
    if (finished_before()) return 0;
    begin_books();
    try {
      ranks_->doing("loading the model");
      load();
      const Ending ending = loop();
      return finish(ending);
    } catch (const Error& error) {
      if (books_) books_->fail(error);
      throw;
    }
  }

  /// machine.ranks is what was started; where the recipe says another number, one of them is wrong.
  void take_ranks() {
    int& ranks = file_.recipe.machine.ranks;
    Origin& origin = file_.origins["machine.ranks"];
    if (ranks != ranks_->size() && origin.kind != Origin::Kind::default_value) {
      throw Error(Fault::usage, {"machine.ranks is " + std::to_string(ranks) + ", and " +
                                     std::to_string(ranks_->size()) + " ranks were started",
                                 recipe().name + ": machine.ranks",
                                 "Set machine.ranks: " + std::to_string(ranks_->size()) +
                                     ", or start as many ranks as the recipe says."});
    }
    ranks = ranks_->size();
    set_threads(
        recipe().compute.threads.value_or(std::max(1, set_threads(0) / ranks_->sharing_cores())));
  }

  /// The ranks must be at the same thing; told before anything is prepared from it.
  void agree_on_the_recipe() {
    std::vector<SharedFact> facts = {{"the program's version", TAILOR_VERSION}};
    for (const RecipeKey& key : recipe_keys()) {
      facts.push_back({"the recipe's " + key.path, without_password(key.write(recipe()))});
    }
    require_agreement(ranks_->all(), facts);
  }

  void agree_on_data_and_model() {
    if (ranks_->others() == nullptr) return;
    base_fingerprint_ = base_fingerprint();
    const std::vector<SharedFact> facts = {{"the training data", data_.digest},
                                           {"the base model", base_fingerprint_}};
    require_agreement(ranks_->all(), facts);
  }

  /// The store's, or that of the model's weights, which are read for it.
  std::string base_fingerprint() const {
    const fs::path store = recipe_store(recipe());
    return store.empty() ? fingerprint(Checkpoint::open(model_folder_), spec_)
                         : Store::open(store).fingerprint();
  }

  /// Everything that can be wrong without touching the output folder: model, data, targets, plan.
  void prepare_inputs() {
    model_folder_ = find_model_folder(recipe().base_model);
    spec_ = read_model_spec(model_folder_);
    apply_store(file_);
    for (const std::string& note : resolve(
             file_, {static_cast<int>(spec_.experts), static_cast<int>(spec_.experts_per_token)})) {
      log_info("does not apply to this model: " + note);
    }
    choose_experts();
    drop_targets_that_do_not_apply();
    for (const std::string& line : describe_sites(choose_sites(spec_, lora())))
      log_info("LoRA on " + line);
    fix_global_batch();
    agree_on_the_recipe();
    ranks_->in_turns("preparing the data", [&] {
      data_ = prepare_data(data_options(recipe()), model_tokenizer(model_folder_, spec_.vocab),
                           spec_.vocab);
      remember_data(recipe(), data_);
    });
    release_free_memory();
    train_store_ = std::make_shared<const TokenStore>(TokenStore::open(data_.train.store));
    if (data_.validation) {
      validation_store_ =
          std::make_shared<const TokenStore>(TokenStore::open(data_.validation->store));
    }
    log_info("data: " + count_text(train_store_->rows()) + " rows, " +
             count_text(train_store_->tokens()) + " tokens, " +
             count_text(train_store_->trained_tokens()) + " of them trained, rows " +
             number_text(100 * data_.train.fill, 3) + " % full");
    const SamplerOptions sampler{recipe().global_batch_rows(), recipe().training.micro_batch_size,
                                 recipe().training.shuffle,
                                 static_cast<std::uint64_t>(recipe().seed)};
    source_ = std::make_unique<StoreTokenSource>(train_store_, sampler);
    steps_ = steps_of(train_store_->rows(), static_cast<double>(recipe().training.num_epochs),
                      sampler.rows_per_step);
    if (recipe().training.max_steps) steps_ = std::min(steps_, *recipe().training.max_steps);
    identity_ = {data_.digest, recipe().seed, sampler.rows_per_step, sampler.shuffle};
    agree_on_data_and_model();
    together(ranks_->all(), "planning", [&] { make_the_plan(); });
    agree_on_the_plan();
  }

  /// The rows of a step are fixed at a run's first start, whatever number of ranks goes on with it.
  void fix_global_batch() {
    std::optional<std::int64_t>& rows = file_.recipe.training.global_batch_rows;
    const fs::path before = RunFolder::recipe(recipe().output_dir);
    std::error_code error;
    if (!rows && arguments_.resume && fs::exists(before, error)) {
      rows = read_recipe(before, {}).recipe.global_batch_rows();
    }
    if (!rows) rows = recipe().global_batch_rows();
  }

  /// What lora.experts names, before anything large is read.
  void choose_experts() {
    if (!recipe().lora.experts || spec_.experts == 0) return;
    const fs::path store = recipe_store(recipe());
    std::vector<std::string> notes;
    const auto selection = apply_selection(
        file_.recipe, read_routed_model(store.empty() ? model_folder_ : store), notes);
    for (const std::string& note : notes) log_info(note);
    chosen_experts_ = selection->by_layer();
  }
  LoraOptions lora() const { return lora_options(recipe().lora, chosen_experts_); }

  /// Groups of lora.targets that the recipe did not set itself stand for "what there is": a default
  /// that names experts must not fail on a dense model. What the user wrote is held to.
  void drop_targets_that_do_not_apply() {
    LoraTargets& targets = file_.recipe.lora.targets;
    const auto origin = file_.origins.find("lora.targets");
    const bool by_default =
        origin == file_.origins.end() || origin->second.kind == Origin::Kind::default_value;
    if (!by_default) return;
    const std::int64_t moe = spec_.moe_layer_count();
    if (moe == 0) targets.experts = targets.shared_expert = targets.router = false;
    if (moe == spec_.layer_count()) targets.dense_mlp = false;
  }

  void make_the_plan() {
    const Machine machine = recipe_machine(recipe());
    if (machine.kind != Machine::Kind::cpu) {
      throw Error(
          Fault::device,
          {"machine profile '" + machine.name + "' has GPUs, this version computes on the CPU only",
           recipe().name + ": machine.profile", "Set machine.profile: auto to train here."});
    }
    sku_ = machine.sku;
    plan_ = plan_recipe({file_, model_facts(spec_, recipe().base_model), {}}, stats_of(data_),
                        Measure::never)
                .plan;
    for (const std::string& warning : plan_.warnings) log_warning(warning);
    if (!plan_.fits) throw does_not_fit(plan_);
  }

  /// Every rank planned for the memory it found; in what changes the order of exchanges they follow
  /// the one that has least. The plan's resident weights are those of a machine, for its ranks.
  void agree_on_the_plan() {
    if (ranks_->others() == nullptr) return;
    std::array<double, 3> needs = {plan_.keep_activations ? 0.0 : 1.0,
                                   plan_.activations == ActivationHome::disk ? 1.0 : 0.0,
                                   plan_.expert_state == StateHome::disk ? 1.0 : 0.0};
    ranks_->all().all_reduce(needs, Reduce::max);
    plan_.keep_activations = needs[0] == 0;
    if (needs[1] > 0) plan_.activations = ActivationHome::disk;
    if (needs[2] > 0) plan_.expert_state = StateHome::disk;
  }

  void open_folder() {
    // The first rank takes the folder, the others find it taken for them.
    together(ranks_->all(), "opening the run's folder", [&] {
      if (!ranks_->first()) return;
      if (!arguments_.resume) refuse_over_budget("");
      folder_ = std::make_unique<RunFolder>(
          RunFolder::open(recipe().output_dir, arguments_.resume, clock_));
      if (chosen_experts_) folder_->keep_experts(*recipe().lora.experts);
    });
    const std::vector<std::string> said = all_texts(
        ranks_->all(),
        ranks_->first() ? (folder_->resumed() ? "r" : "n") + folder_->path().string() : "");
    resumed_ = said.front().starts_with('r');
    path_ = said.front().substr(1);
    scratch_ =
        path_ / (ranks_->others() == nullptr ? "scratch" : "scratch-" + ranks_->name().substr(5));
    AdamWOptions adamw;
    adamw.beta1 = recipe().training.adam_beta1;
    adamw.beta2 = recipe().training.adam_beta2;
    adamw.epsilon = recipe().training.adam_epsilon;
    adamw.weight_decay = recipe().training.weight_decay;
    adamw.learning_rate_ratio_b = recipe().lora.learning_rate_ratio_b;
    if (plan_.expert_state == StateHome::disk || plan_.activations == ActivationHome::disk) {
      make_folders(scratch());
    }
    if (plan_.expert_state == StateHome::disk) experts_.folder = scratch();
    together(ranks_->all(), "making the adapter", [&] {
      const auto keep_mine = [this](const Adapter& adapter, const LoraSite& site) {
        if (ranks_->others() == nullptr) return;
        if (!shards_) shards_.emplace(adapter, ranks_->all().rank(), ranks_->size());
        const FactorRange filled{site.a_offset, site.a_offset + site.a_size()};
        shards_->drop_others(adapter.arena(), filled, static_cast<std::int64_t>(sizeof(float)));
      };
      adapter_ =
          std::make_unique<Adapter>(make_adapter(recipe(), lora(), spec_, experts_, keep_mine));
      optimizer_ = std::make_unique<AdamW>(*adapter_, adamw, experts_);
    });
    if (shards_) share_.emplace(StateShare{ranks_->all(), *shards_});
    if (!resumed_) return;
    const auto found = load_newest_checkpoint(
        RunFolder::checkpoints(path_), *adapter_, *optimizer_, identity_,
        [](const std::string& text) { log_warning(text); }, share_ ? &*share_ : nullptr);
    if (found) first_step_ = found->step;
  }

  void refuse_over_budget(const std::string& run) {
    if (!arguments_.over_budget) {
      refuse_plan_over_budget(recipe(), plan_, run, first_step_, steps_, clock_);
    }
  }

  bool finished_before() {
    if (!resumed_ || first_step_ < steps_) return false;
    if (!ranks_->first()) return true;
    log_info("this run is finished: " + std::to_string(first_step_) + " of " +
             std::to_string(steps_) + " steps are done");
    std::error_code error;
    if (arguments_.json && fs::exists(folder_->summary(), error)) {
      std::printf("%s\n", read_json(folder_->summary()).dump().c_str());
    }
    return true;
  }

  void begin_books() {
    together(ranks_->all(), "opening the ledger", [&] {
      if (!ranks_->first()) return;
      if (arguments_.resume) refuse_over_budget(folder_->run());
      write_atomically(folder_->recipe(), resolved_text(file_));
      write_atomically(folder_->plan(), plan_json(plan_).dump(2) + "\n");
      const RunBooks::Facts facts{
          resolved_text(file_), data_.digest,           sku_,        first_step_, steps_,
          began_steady_ms_,     arguments_.over_budget, moe_layers()};
      books_ = std::make_unique<RunBooks>(recipe(), plan_, *folder_, *ranks_, clock_, facts);
    });
  }

  std::vector<int> moe_layers() const {
    std::vector<int> out;
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
      if (spec_.layers[l].moe) out.push_back(static_cast<int>(l));
    }
    return out;
  }

  void load() {
    const BaseRequest request = base_request();
    if (request.pack) {
      ranks_->in_turns("packing the base", [&] { pack_base(model_folder_, request); });
    }
    model_ = open_model(
        model_folder_, recipe().compute.dtype == ComputeType::bfloat16 ? at::kBFloat16 : at::kFloat,
        request);
    if (!model_.stored_digest.empty()) {
      // Each node may have a store of its own; what one rank gathers has the others' parts in it.
      const SharedFact weights{"the base model's packed weights", model_.stored_digest};
      require_agreement(ranks_->all(), {&weights, 1});
    }
    log_info("model: " + count_text(spec_.parameters()) + " parameters, " +
             (model_.stream ? stream_text(*model_.stream)
                            : bytes_text(model_.weight_bytes) + " in memory") +
             ", loaded in " + seconds_text(model_.load_seconds));
    together(ranks_->all(), "opening metrics.jsonl", [&] {
      if (!books_) return;
      if (base_fingerprint_.empty()) base_fingerprint_ = base_fingerprint();
      books_->open_metrics();
    });
  }

  /// What the recipe's `base:` block and the plan say about the frozen weights.
  BaseRequest base_request() const {
    const BaseRecipe& base = recipe().base;
    BaseRequest out;
    out.model_name = recipe().base_model;
    out.store = recipe_store(recipe());
    out.formats = store_formats(base);
    const bool streams = *plan_.stream_bytes_per_step.value > 0;
    out.ranks = ranks_->sharing_weights();
    out.pack = out.store.empty() && (out.ranks != nullptr || wants_store(recipe(), plan_));
    out.all_resident = !streams && !base.device_memory && !base.host_memory;
    if (base.device_memory && base.host_memory) {
      out.device_bytes = base.device_memory;
      out.host_bytes = base.host_memory;
    } else if (!out.all_resident) {
      // The plan's share goes to the one that is left open.
      const std::int64_t given = base.device_memory.value_or(base.host_memory.value_or(0));
      const std::int64_t rest = std::max<std::int64_t>(0, plan_.device_tile_bytes - given);
      out.device_bytes = base.device_memory ? given : base.host_memory ? rest : given + rest;
      out.host_bytes = base.host_memory ? given : base.device_memory ? rest : 0;
      // The plan speaks of the machine, the recipe of a rank.
      if (!base.device_memory && !base.host_memory) *out.device_bytes /= ranks_->on_this_node();
    }
    return out;
  }

  /// Nameless files live below it, so that it is empty whenever a run ends.
  const fs::path& scratch() const { return scratch_; }

  TrainerOptions trainer_options() const {
    TrainerOptions out;
    out.schedule = make_schedule(recipe().training, steps_);
    out.max_grad_norm = recipe().training.max_grad_norm.value_or(0);
    out.dropout = recipe().lora.dropout;
    out.seed = static_cast<std::uint64_t>(recipe().seed);
    out.keep = plan_.keep_activations ? Activations::kept : Activations::recomputed;
    if (experts_.on_disk()) out.paged_experts = experts_;
    out.ranks = ranks_->others();
    // Some thirty samples show where the rows go; every step's counts would outgrow the metrics.
    constexpr std::int64_t kExpertSamples = 32;
    out.count_experts_every = (steps_ + kExpertSamples - 1) / kExpertSamples;
    return out;
  }

  bool evaluates_after(std::int64_t step) const {
    const std::int64_t every = recipe().training.eval_every_steps;
    return validation_store_ && (step == steps_ || (every > 0 && step % every == 0));
  }

  /// An evaluation that an interruption cut short, after the step this attempt goes on from.
  bool evaluation_is_owed() const {
    if (first_step_ == 0 || !evaluates_after(first_step_)) return false;
    const Metrics metrics = read_metrics(RunFolder::metrics(path_));
    return std::none_of(metrics.evals.begin(), metrics.evals.end(),
                        [&](const EvalMetrics& line) { return line.step == first_step_; });
  }

  Ending loop() {
    if (plan_.activations == ActivationHome::disk) model_.decoder->keep_in({scratch()});
    Trainer trainer(*model_.decoder, *adapter_, *optimizer_, *source_, trainer_options());
    const Interrupt interrupt;
    std::optional<RunProgress> progress;
    if (books_) progress.emplace(steps_, first_step_);
    if (progress && first_step_ > 0) {
      progress->say("going on after step " + std::to_string(first_step_));
    }
    switch_to(Phase::train);
    const auto evaluate_after = [&](std::int64_t step) {
      evaluate_now(step, progress ? &*progress : nullptr, interrupt);
    };
    if (any_rank(ranks_->all(), books_ && evaluation_is_owed())) evaluate_after(first_step_);
    double saved_at = seconds_now();
    for (std::int64_t s = first_step_; s < steps_; ++s) {
      ranks_->doing("step " + std::to_string(s + 1));
      const StepRecord record = trainer.step(s, s + 1 < steps_ && !evaluates_after(s + 1));
      if (books_) {
        books_->step(record);
        progress->step(record, books_->money());
      }
      const std::int64_t done = s + 1;
      if (evaluates_after(done)) evaluate_after(done);
      // The first rank keeps clock and books; whoever is asked to stop asks for all.
      const CheckpointRecipe& when = recipe().checkpoint;
      const bool late = when.every_minutes && seconds_now() - saved_at >= *when.every_minutes * 60;
      std::array<double, 3> wanted = {interrupt.asked() ? 1.0 : 0.0,
                                      books_ && books_->over_budget(done, *progress) ? 1.0 : 0.0,
                                      books_ && late ? 1.0 : 0.0};
      ranks_->all().all_reduce(wanted, Reduce::max);
      const Ending ending = done == steps_  ? Ending::finished
                            : wanted[0] > 0 ? Ending::interrupted
                            : wanted[1] > 0 ? Ending::budget
                                            : Ending::finished;
      const bool stop = done == steps_ || ending != Ending::finished;
      const bool due = (when.every_steps && done % *when.every_steps == 0) || wanted[2] > 0;
      if (stop || due) {
        ranks_->doing("saving after step " + std::to_string(done));
        if (progress) progress->doing("saving");
        trainer.flush();
        save(done, trainer.sharded());
        if (progress) progress->doing("");
        saved_at = seconds_now();
      }
      if (stop) return ending;
    }
    return Ending::finished;
  }

  void switch_to(Phase phase) {
    if (books_) books_->switch_to(phase);
  }

  void evaluate_now(std::int64_t step, RunProgress* progress, const Interrupt& interrupt) {
    ranks_->doing("evaluating after step " + std::to_string(step));
    switch_to(Phase::evaluate);
    if (progress != nullptr) progress->doing("evaluating");
    model_.decoder->set_adapter(adapter_.get());
    const std::int64_t rows =
        std::max<std::int64_t>(1, recipe().training.micro_batch_size) * ranks_->size();
    // Who asks to stop waits for a step, not for an evaluation: it is made up for on resuming.
    const std::optional<Evaluation> done = evaluate(
        *model_.decoder,
        EvaluationSource(validation_store_, rows, recipe().training.micro_batch_size),
        [&] { return any_rank(ranks_->all(), interrupt.asked()); }, ranks_->others());
    switch_to(Phase::train);
    if (!done || !books_) return;
    books_->evaluation(step, *done);
    progress->evaluation(step, *done);
  }

  void save(std::int64_t step, ShardedFactors* sharded) {
    switch_to(Phase::checkpoint);
    const double began = seconds_now();
    if (books_) books_->sync();
    const SavedCheckpoint saved =
        save_checkpoint(RunFolder::checkpoints(path_), step, *adapter_, *optimizer_, identity_,
                        recipe().checkpoint.keep, share_ ? &*share_ : nullptr);
    if (sharded != nullptr) sharded->gather_to_first();
    together(ranks_->all(), "writing the adapter", [&] {
      if (!books_) return;
      write_peft_adapter(folder_->adapter(), *adapter_, spec_,
                         {model_.source.empty() ? recipe().base_model : model_.source,
                          model_.prefix, base_fingerprint_});
      // What the adapter learned to correct: merging it asks for the same numbers.
      write_base_record(folder_->adapter(),
                        {std::string(choice_word(recipe().base.format)),
                         std::string(choice_word(recipe().base.non_expert_format))});
      books_->checkpoint(saved, seconds_now() - began);
    });
    if (sharded != nullptr) sharded->drop_gathered();
    switch_to(Phase::train);
  }

  int finish(Ending ending) {
    int code = 0;
    RunStatus status = RunStatus::succeeded;
    std::string reason;
    if (ending == Ending::interrupted) {
      code = static_cast<int>(Fault::stopped);
      status = RunStatus::stopped_user;
      reason = "interrupted; saved, resumable";
    } else if (ending == Ending::budget) {
      code = static_cast<int>(Fault::budget);
      status = RunStatus::stopped_budget;
      reason = "the budget is spent; saved, resumable with a larger one";
    }
    together(ranks_->all(), "closing the books", [&] {
      if (!books_) return;
      books_->adapter(folder_->adapter() / "adapter_model.safetensors", steps_);
      const RunReport report = books_->finish(status, code, reason);
      if (arguments_.json) {
        std::printf("%s\n", summary_json(report).dump().c_str());
      } else {
        std::printf("%s", report_text(report).c_str());
      }
    });
    if (ending == Ending::finished || !ranks_->first()) return code;
    const bool budget = ending == Ending::budget;
    std::vector<std::string> shown;
    for (const std::string& text : arguments_.overrides) shown.push_back(without_password(text));
    stopped_ = Error(budget ? Fault::budget : Fault::stopped,
                     {budget ? "stopped by the budget" : "interrupted", path_.string(),
                      "All work is saved. Go on with: tailor train " + arguments_.recipe + " " +
                          join(shown, " ") + (arguments_.overrides.empty() ? "" : " ") +
                          "--resume" + (budget ? " and a larger budget" : "")});
    return code;
  }

  const TrainArguments& arguments_;
  RealClock clock_;
  std::int64_t began_steady_ms_;
  std::unique_ptr<RunRanks> ranks_;
  RecipeFile file_;
  fs::path model_folder_;
  ModelSpec spec_;
  ChosenByLayer chosen_experts_;
  ArenaHome experts_;  ///< of the routed experts' state
  std::unique_ptr<Adapter> adapter_;
  PrepareReport data_;
  std::shared_ptr<const TokenStore> train_store_, validation_store_;
  std::unique_ptr<StoreTokenSource> source_;
  std::int64_t steps_ = 0, first_step_ = 0;
  RunIdentity identity_;
  std::string sku_;
  Plan plan_;
  std::unique_ptr<RunFolder> folder_;  ///< the first rank's
  fs::path path_, scratch_;            ///< of the run; of this rank's nameless files
  bool resumed_ = false;
  std::unique_ptr<AdamW> optimizer_;
  std::optional<FactorShards> shards_;
  std::optional<StateShare> share_;
  std::unique_ptr<RunBooks> books_;  ///< the first rank's
  OpenedModel model_;
  std::string base_fingerprint_;  ///< goes into the adapter; the ranks compare it
  std::optional<Error> stopped_;  ///< why a run that went well ended early
};

}  // namespace

int run_train(const TrainArguments& arguments) { return Run(arguments).go(); }

}  // namespace tailor
