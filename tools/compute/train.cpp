#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>

#include "adapters/peft_files.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"
#include "data/runs/ledger.h"
#include "data/runs/metrics.h"
#include "data/runs/report.h"
#include "data/runs/run_folder.h"
#include "data/runs/segment_timer.h"
#include "data/runs/tensorboard.h"
#include "data/tokens/token_store.h"
#include "recipes/machine.h"
#include "recipes/model_facts.h"
#include "recipes/plan.h"
#include "recipes/write.h"
#include "tools/compute/make_adapter.h"
#include "tools/compute/progress.h"
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

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown";
}

/// One run from its recipe to its report; see run_train. Members in the order they come to be.
class Run {
 public:
  explicit Run(const TrainArguments& arguments)
      : arguments_(arguments), began_steady_ms_(clock_.steady_ms()) {
    file_ = open_recipe(arguments.recipe, arguments.overrides);
    refuse_unsupported(recipe());
    if (recipe().cost.ledger && recipe().cost.ledger->starts_with("postgres")) {
      throw Error(Fault::usage,
                  {"a PostgreSQL ledger is not possible yet", recipe().name + ": cost.ledger",
                   "Leave cost.ledger at null, or give a file's path."});
    }
    set_threads(recipe().compute.threads.value_or(0));
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() {
    std::error_code ignored;
    if (folder_) fs::remove(scratch(), ignored);
  }

  int go() {
    prepare_inputs();
    open_folder();
    if (finished_before()) return 0;
    begin_books();
    try {
      load();
      const Ending ending = loop();
      return finish(ending);
    } catch (const Error& error) {
      close_books(error);
      throw;
    }
  }

 private:
  const Recipe& recipe() const { return file_.recipe; }

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
    data_ = prepare_data(data_options(recipe()), model_tokenizer(model_folder_, spec_.vocab),
                         spec_.vocab);
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
    make_the_plan();
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

  void open_folder() {
    folder_ = std::make_unique<RunFolder>(
        RunFolder::open(recipe().output_dir, arguments_.resume, clock_));
    if (chosen_experts_) folder_->keep_experts(*recipe().lora.experts);
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
    adapter_ = std::make_unique<Adapter>(make_adapter(recipe(), lora(), spec_, experts_));
    optimizer_ = std::make_unique<AdamW>(*adapter_, adamw, experts_);
    if (!folder_->resumed()) return;
    const auto found =
        load_newest_checkpoint(folder_->checkpoints(), *adapter_, *optimizer_, identity_,
                               [](const std::string& text) { log_warning(text); });
    if (found) first_step_ = found->step;
  }

  bool finished_before() {
    if (!folder_->resumed() || first_step_ < steps_) return false;
    log_info("this run is finished: " + std::to_string(first_step_) + " of " +
             std::to_string(steps_) + " steps are done");
    std::error_code error;
    if (arguments_.json && fs::exists(folder_->summary(), error)) {
      std::printf("%s\n", read_json(folder_->summary()).dump().c_str());
    }
    return true;
  }

  void begin_books() {
    write_atomically(folder_->recipe(), resolved_text(file_));
    write_atomically(folder_->plan(), plan_json(plan_).dump(2) + "\n");
    ledger_ = Ledger::open(recipe().cost.ledger.value_or(Ledger::default_place()), clock_);
    RunFacts facts;
    facts.run = folder_->run();
    facts.name = recipe().name;
    facts.project = recipe().cost.project.value_or("");
    facts.output_dir = folder_->path();
    facts.base_model = recipe().base_model;
    facts.dataset_sha256 = data_.digest;
    facts.recipe_text = resolved_text(file_);
    facts.recipe_sha256 = sha256_hex(facts.recipe_text);
    facts.code_version = TAILOR_VERSION;
    facts.seed = recipe().seed;
    facts.usd_micros_limit = recipe().budget.usd_micros;
    if (recipe().budget.gpu_hours) {
      facts.device_ms_limit = static_cast<std::int64_t>(*recipe().budget.gpu_hours * 3.6e6);
    }
    ledger_->begin_run(facts);
    AttemptFacts attempt;
    attempt.host = host_name();
    attempt.device_kind = "cpu";
    attempt.sku = sku_;
    attempt.usd_micros_per_device_hour = plan_.price.usd_micros_per_device_hour;
    attempt.no_price_reason = plan_.price.reason;
    attempt.price_id = plan_.price.id;
    attempt.price_kind = plan_.price.kind;
    attempt.price_source = plan_.price.source;
    attempt.resumed_from_step = first_step_;
    attempt_ = ledger_->begin_attempt(folder_->run(), attempt);
    timer_ = std::make_unique<SegmentTimer>(*ledger_, attempt_, Phase::load,
                                            SegmentTimer::Heartbeats::thread, began_steady_ms_);
  }

  void load() {
    model_ = open_model(
        model_folder_, recipe().compute.dtype == ComputeType::bfloat16 ? at::kBFloat16 : at::kFloat,
        base_request());
    log_info("model: " + count_text(spec_.parameters()) + " parameters, " +
             (model_.stream ? stream_text(*model_.stream)
                            : bytes_text(model_.weight_bytes) + " in memory") +
             ", loaded in " + seconds_text(model_.load_seconds));
    metrics_ = std::make_unique<MetricsWriter>(
        folder_->resumed() ? MetricsWriter::resume(folder_->metrics(), first_step_)
                           : MetricsWriter::create(folder_->metrics()));
    if (recipe().logging.tensorboard) {
      tensorboard_ = std::make_unique<TensorboardWriter>(folder_->path(), clock_, first_step_);
      if (first_step_ == 0)
        tensorboard_->text("recipe", "```yaml\n" + resolved_text(file_) + "```");
    }
  }

  /// What the recipe's `base:` block and the plan say about the frozen weights.
  BaseRequest base_request() const {
    const BaseRecipe& base = recipe().base;
    BaseRequest out;
    out.model_name = recipe().base_model;
    out.store = recipe_store(recipe());
    out.formats = store_formats(base);
    const bool streams = *plan_.stream_bytes_per_step.value > 0;
    out.pack = out.store.empty() &&
               (base.format != BaseFormat::as_is || base.non_expert_format != BaseFormat::as_is ||
                base.device_memory || base.host_memory || streams);
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
    }
    return out;
  }

  /// Nameless files live below it, so that it is empty whenever a run ends.
  fs::path scratch() const { return folder_->path() / "scratch"; }

  TrainerOptions trainer_options() const {
    TrainerOptions out;
    out.schedule = make_schedule(recipe().training, steps_);
    out.max_grad_norm = recipe().training.max_grad_norm.value_or(0);
    out.dropout = recipe().lora.dropout;
    out.seed = static_cast<std::uint64_t>(recipe().seed);
    out.keep = plan_.keep_activations ? Activations::kept : Activations::recomputed;
    if (experts_.on_disk()) out.paged_experts = experts_;
    return out;
  }

  bool evaluates_after(std::int64_t step) const {
    const std::int64_t every = recipe().training.eval_every_steps;
    return validation_store_ && (step == steps_ || (every > 0 && step % every == 0));
  }

  /// An evaluation that an interruption cut short, after the step this attempt goes on from.
  bool evaluation_is_owed() const {
    if (first_step_ == 0 || !evaluates_after(first_step_)) return false;
    const Metrics metrics = read_metrics(folder_->metrics());
    return std::none_of(metrics.evals.begin(), metrics.evals.end(),
                        [&](const EvalMetrics& line) { return line.step == first_step_; });
  }

  Ending loop() {
    if (plan_.activations == ActivationHome::disk) model_.decoder->keep_in({scratch()});
    Trainer trainer(*model_.decoder, *adapter_, *optimizer_, *source_, trainer_options());
    const Interrupt interrupt;
    RunProgress progress(steps_, first_step_);
    if (first_step_ > 0) progress.say("going on after step " + std::to_string(first_step_));
    timer_->switch_to(Phase::train);
    if (evaluation_is_owed()) evaluate_now(first_step_, progress, interrupt);
    double saved_at = seconds_now();
    for (std::int64_t s = first_step_; s < steps_; ++s) {
      const StepRecord record = trainer.step(s, s + 1 < steps_ && !evaluates_after(s + 1));
      record_step(record);
      progress.step(record, timer_->spent().usd());
      const std::int64_t done = s + 1;
      if (evaluates_after(done)) evaluate_now(done, progress, interrupt);
      const Ending ending = done == steps_          ? Ending::finished
                            : interrupt.asked()     ? Ending::interrupted
                            : over_budget(progress) ? Ending::budget
                                                    : Ending::finished;
      const bool stop = done == steps_ || ending != Ending::finished;
      const CheckpointRecipe& when = recipe().checkpoint;
      const bool due = (when.every_steps && done % *when.every_steps == 0) ||
                       (when.every_minutes && seconds_now() - saved_at >= *when.every_minutes * 60);
      if (stop || due) {
        trainer.flush();
        save(done);
        saved_at = seconds_now();
      }
      if (stop) return ending;
    }
    return Ending::finished;
  }

  void record_step(const StepRecord& record) {
    timer_->step_done({record.step, record.tokens, record.trained_tokens, record.stall_seconds});
    const bool log_it =
        record.step % recipe().logging.metrics_every_steps == 0 || record.step == steps_;
    if (!log_it) return;
    StepMetrics line;
    line.step = record.step;
    line.loss = record.loss;
    line.learning_rate = record.learning_rate;
    line.grad_norm = record.grad_norm;
    line.tokens = record.tokens;
    line.trained_tokens = record.trained_tokens;
    line.seconds = record.seconds;
    line.tokens_per_second = static_cast<double>(record.tokens) / record.seconds;
    line.stream_bytes = record.stream_bytes;
    line.stall_seconds = record.stall_seconds;
    line.gpu_hours = timer_->spent().gpu_hours();
    line.usd = timer_->spent().usd();
    metrics_->write(line);
    if (!tensorboard_) return;
    tensorboard_->scalar("train/loss", line.loss, line.step);
    tensorboard_->scalar("train/learning_rate", line.learning_rate, line.step);
    tensorboard_->scalar("train/grad_norm", line.grad_norm, line.step);
    tensorboard_->scalar("train/tokens_per_second", line.tokens_per_second, line.step);
    if (line.usd) tensorboard_->scalar("cost/usd", *line.usd, line.step);
    tensorboard_->flush();
  }

  void evaluate_now(std::int64_t step, RunProgress& progress, const Interrupt& interrupt) {
    timer_->switch_to(Phase::evaluate);
    model_.decoder->set_adapter(adapter_.get());
    const std::int64_t rows = std::max<std::int64_t>(1, recipe().training.micro_batch_size);
    // Who asks to stop waits for a step, not for an evaluation: it is made up for on resuming.
    const std::optional<Evaluation> done =
        evaluate(*model_.decoder, EvaluationSource(validation_store_, rows, rows),
                 [&] { return interrupt.asked(); });
    timer_->switch_to(Phase::train);
    if (!done) return;
    const Evaluation& result = *done;
    EvalMetrics line;
    line.step = step;
    line.eval_loss = result.loss;
    line.tokens = result.tokens;
    line.seconds = result.seconds;
    line.gpu_hours = timer_->spent().gpu_hours();
    line.usd = timer_->spent().usd();
    metrics_->write(line);
    if (tensorboard_) {
      tensorboard_->scalar("eval/loss", result.loss, step);
      tensorboard_->scalar("eval/token_accuracy", result.token_accuracy, step);
      tensorboard_->flush();
    }
    progress.say("evaluation after step " + std::to_string(step) + ": loss " +
                 number_text(result.loss) + ", token accuracy " +
                 number_text(100 * result.token_accuracy, 3) + " %");
  }

  /// Spent plus what saving and leaving will cost against the budget; warns once on the way there.
  bool over_budget(RunProgress& progress) {
    const BudgetRecipe& budget = recipe().budget;
    if (!budget.usd_micros && !budget.gpu_hours) return false;
    const SegmentTimer::Spent spent = timer_->spent();
    double share = 0;
    const double reserve_hours = (checkpoint_seconds_ + 2) / 3600;
    const double hours = spent.gpu_hours() + reserve_hours;
    if (budget.gpu_hours) share = std::max(share, hours / *budget.gpu_hours);
    if (budget.usd_micros && spent.usd_micros) {
      const double rate = static_cast<double>(plan_.price.usd_micros_per_device_hour.value_or(0));
      share = std::max(share, (static_cast<double>(*spent.usd_micros) + reserve_hours * rate) /
                                  static_cast<double>(*budget.usd_micros));
    }
    if (share >= budget.warn && !warned_of_budget_) {
      warned_of_budget_ = true;
      progress.say("warning: " + number_text(100 * share, 3) + " % of the budget is spent");
      ledger_->event(attempt_, std::nullopt, "budget_warning",
                     number_text(100 * share, 3) + " % spent");
    }
    return share >= 1;
  }

  void save(std::int64_t step) {
    const Phase before = timer_->switch_to(Phase::checkpoint);
    const double began = seconds_now();
    metrics_->sync();
    const SavedCheckpoint saved = save_checkpoint(folder_->checkpoints(), step, *adapter_,
                                                  *optimizer_, identity_, recipe().checkpoint.keep);
    ledger_->artifact(attempt_,
                      {"checkpoint", saved.folder.string(), step, saved.bytes, saved.sha256});
    write_peft_adapter(
        folder_->adapter(), *adapter_, spec_,
        {model_.source.empty() ? recipe().base_model : model_.source, model_.prefix});
    checkpoint_seconds_ = seconds_now() - began;
    timer_->switch_to(before);
  }

  int finish(Ending ending) {
    const fs::path adapter = folder_->adapter() / "adapter_model.safetensors";
    ledger_->artifact(attempt_,
                      {"adapter", adapter.string(), steps_,
                       static_cast<std::int64_t>(fs::file_size(adapter)), sha256_file(adapter)});
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
    timer_->finish(status, code, reason);
    const RunReport report = write_report(*ledger_, folder_->run());
    if (arguments_.json) {
      std::printf("%s\n", summary_json(report).dump().c_str());
    } else {
      std::printf("%s", report_text(report).c_str());
    }
    if (ending == Ending::finished) return 0;
    const bool budget = ending == Ending::budget;
    throw Error(budget ? Fault::budget : Fault::stopped,
                {budget ? "stopped by the budget" : "interrupted", folder_->path().string(),
                 "All work is saved. Go on with: tailor train " + arguments_.recipe + " " +
                     join(arguments_.overrides, " ") + (arguments_.overrides.empty() ? "" : " ") +
                     "--resume" + (budget ? " and a larger budget" : "")});
  }

  /// The attempt failed: its time stays on the books.
  void close_books(const Error& error) {
    if (timer_ == nullptr) return;
    try {
      timer_->finish(RunStatus::failed, error.exit_code(), error.parts().what);
      write_report(*ledger_, folder_->run());
    } catch (const Error& second) {
      log_warning("the ledger could not be closed: " + second.parts().what);
    }
  }

  const TrainArguments& arguments_;
  RealClock clock_;
  std::int64_t began_steady_ms_;
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
  std::unique_ptr<RunFolder> folder_;
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<Ledger> ledger_;
  AttemptId attempt_;
  std::unique_ptr<SegmentTimer> timer_;
  OpenedModel model_;
  std::unique_ptr<MetricsWriter> metrics_;
  std::unique_ptr<TensorboardWriter> tensorboard_;
  double checkpoint_seconds_ = 1;
  bool warned_of_budget_ = false;
};

}  // namespace

int run_train(const TrainArguments& arguments) { return Run(arguments).go(); }

}  // namespace tailor
