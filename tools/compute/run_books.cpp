#include "tools/compute/run_books.h"

#include <unistd.h>

#include <algorithm>
#include <array>

#include "base/file.h"
#include "base/launcher.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/text.h"

namespace tailor {
namespace {

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "unknown";
}

}  // namespace

RunBooks::RunBooks(const Recipe& recipe, const Plan& plan, const RunFolder& folder,
                   const RunRanks& ranks, const Clock& clock, const Facts& facts)
    : recipe_(recipe),
      plan_(plan),
      folder_(folder),
      facts_(facts),
      devices_(ranks.size()),
      ledger_(Ledger::open(recipe.cost.ledger.value_or(Ledger::default_place()), clock)),
      clock_(clock) {
  RunFacts run;
  run.run = folder.run();
  run.name = recipe.name;
  run.project = recipe.cost.project.value_or("");
  run.output_dir = folder.path();
  run.base_model = recipe.base_model;
  run.dataset_sha256 = facts.dataset_sha256;
  run.recipe_text = facts.recipe_text;
  run.recipe_sha256 = sha256_hex(facts.recipe_text);
  run.code_version = TAILOR_VERSION;
  run.seed = recipe.seed;
  run.usd_micros_limit = recipe.budget.usd_micros;
  if (recipe.budget.gpu_hours) {
    run.device_ms_limit = static_cast<std::int64_t>(*recipe.budget.gpu_hours * 3.6e6);
  }
  ledger_->begin_run(run);
  AttemptFacts attempt;
  const Launcher launcher = read_launcher();
  attempt.launcher = launcher.name;
  attempt.launcher_job = launcher.job_id;
  attempt.world_size = ranks.size();
  attempt.nodes = ranks.nodes();
  attempt.devices = devices_;
  attempt.host = host_name();
  attempt.device_kind = "cpu";
  attempt.sku = facts.sku;
  attempt.usd_micros_per_device_hour = plan.price.usd_micros_per_device_hour;
  attempt.no_price_reason = plan.price.reason;
  attempt.price_id = plan.price.id;
  attempt.price_kind = plan.price.kind;
  attempt.price_source = plan.price.source;
  attempt.resumed_from_step = facts.first_step;
  attempt_ = ledger_->begin_attempt(folder.run(), attempt);
  timer_ = std::make_unique<SegmentTimer>(*ledger_, attempt_, Phase::load,
                                          SegmentTimer::Heartbeats::thread, facts.began_steady_ms);
}

void RunBooks::open_metrics() {
  metrics_ = std::make_unique<MetricsWriter>(
      folder_.resumed() ? MetricsWriter::resume(folder_.metrics(), facts_.first_step)
                        : MetricsWriter::create(folder_.metrics()));
  if (!recipe_.logging.tensorboard) return;
  tensorboard_ = std::make_unique<TensorboardWriter>(folder_.path(), clock_, facts_.first_step);
  if (facts_.first_step == 0) {
    tensorboard_->text("recipe", "```yaml\n" + facts_.recipe_text + "```");
  }
}

RunMoney RunBooks::money() const {
  const SegmentTimer::Spent spent = timer_->spent();
  RunMoney out;
  out.gpu_hours = spent.gpu_hours();
  out.usd = spent.usd();
  out.devices = devices_;
  out.hours_word = "device-hours";  // as its ledger has it: the attempt's kind is cpu
  if (const auto rate = plan_.price.usd_micros_per_device_hour) {
    out.usd_per_second = static_cast<double>(*rate) * devices_ / 3.6e9;
  }
  if (const auto usd = recipe_.budget.usd_micros) {
    out.usd_budget = static_cast<double>(*usd) / 1e6;
  }
  out.gpu_hours_budget = recipe_.budget.gpu_hours;
  return out;
}

void RunBooks::step(const StepRecord& record) {
  timer_->step_done({record.step, record.tokens, record.trained_tokens, record.stall_seconds});
  if (!record.expert_rows.empty()) write_experts(record);
  const bool log_it =
      record.step % recipe_.logging.metrics_every_steps == 0 || record.step == facts_.steps;
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
  if (devices_ > 1) {
    line.exchange = {record.exchange_weight_bytes, record.exchange_factor_bytes,
                     record.exchange_gradient_bytes, record.exchange_seconds,
                     record.exchange_exposed_seconds};
  }
  line.host_bytes_peak = resident_bytes_peak();
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

void RunBooks::write_experts(const StepRecord& record) {
  ExpertMetrics line{record.step, {}};
  const auto experts =
      static_cast<std::ptrdiff_t>(record.expert_rows.size() / facts_.moe_layers.size());
  auto rows = record.expert_rows.begin();
  for (const int layer : facts_.moe_layers) {
    line.layers.push_back({layer, {rows, rows + experts}});
    rows += experts;
  }
  metrics_->write(line);
}

void RunBooks::evaluation(std::int64_t step, const Evaluation& result) {
  EvalMetrics line;
  line.step = step;
  line.eval_loss = result.loss;
  line.tokens = result.tokens;
  line.seconds = result.seconds;
  line.gpu_hours = timer_->spent().gpu_hours();
  line.usd = timer_->spent().usd();
  metrics_->write(line);
  if (!tensorboard_) return;
  tensorboard_->scalar("eval/loss", result.loss, step);
  tensorboard_->scalar("eval/token_accuracy", result.token_accuracy, step);
  tensorboard_->flush();
}

void RunBooks::checkpoint(const SavedCheckpoint& saved, double seconds) {
  checkpoint_seconds_ = seconds;
  ledger_->artifact(attempt_,
                    {"checkpoint", saved.folder.string(), saved.step, saved.bytes, saved.sha256});
}

bool RunBooks::over_budget(RunProgress& progress) {
  const BudgetRecipe& budget = recipe_.budget;
  if (!budget.usd_micros && !budget.gpu_hours) return false;
  const SegmentTimer::Spent spent = timer_->spent();
  double share = 0;
  const double reserve_hours = devices_ * (checkpoint_seconds_ + 2) / 3600;
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

void RunBooks::adapter(const fs::path& file, std::int64_t step) {
  ledger_->artifact(attempt_, {"adapter", file.string(), step,
                               static_cast<std::int64_t>(fs::file_size(file)), sha256_file(file)});
}

RunReport RunBooks::finish(RunStatus status, int exit_code, const std::string& reason) {
  timer_->finish(status, exit_code, reason);
  return write_report(*ledger_, folder_.run());
}

void RunBooks::fail(const Error& error) {
  try {
    finish(RunStatus::failed, error.exit_code(), error.parts().what);
  } catch (const Error& second) {
    log_warning("the ledger could not be closed: " + second.parts().what);
  }
}

}  // namespace tailor
