#include "data/runs/report.h"

#include <gmock/gmock.h>

#include <cmath>

#include "data/runs/chart.h"
#include "data/runs/listing.h"
#include "data/runs/run_folder.h"
#include "data/runs/segment_timer.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing::Not;

/// A run of two attempts: the first dies at step 14 with a checkpoint at 10, the second finishes.
class ReportTest : public RunsTest {
 protected:
  void SetUp() override {
    RunsTest::SetUp();
    RunFolder folder = RunFolder::open(folder_ / "runs" / "demo", false, clock_);
    path_ = folder.path();
    write_atomically(folder.plan(), R"({"steps": {"value": 20, "unit": "steps", "working": ""},
        "seconds_per_step": {"value": 0.8, "unit": "s", "working": ""},
        "gpu_hours": {"value": 0.02, "unit": "h", "working": ""}, "usd": null})");
    ledger_ = open();
    RunFacts facts = run_facts("support <lora> & co");
    facts.run = run_ = folder.run();
    facts.output_dir = path_.string();
    facts.usd_micros_limit = 2'000'000;
    ledger_->begin_run(facts);
    MetricsWriter metrics = MetricsWriter::create(folder.metrics());
    {
      const AttemptId attempt = ledger_->begin_attempt(run_, attempt_facts());
      SegmentTimer timer(*ledger_, attempt, Phase::load, SegmentTimer::Heartbeats::by_hand);
      train(timer, metrics, 1, 10);
      timer.switch_to(Phase::checkpoint);
      clock_.pass(500);
      train(timer, metrics, 11, 14);
      timer.flush();
      ledger_->event(attempt, 14, "warning", "loss rose & rose");
    }
    clock_.pass(30'000);
    metrics = MetricsWriter::resume(folder.metrics(), 10);
    const AttemptId attempt = ledger_->begin_attempt(run_, attempt_facts(10));
    SegmentTimer timer(*ledger_, attempt, Phase::load, SegmentTimer::Heartbeats::by_hand);
    train(timer, metrics, 11, 20);
    timer.switch_to(Phase::evaluate);
    clock_.pass(900);
    metrics.write(EvalMetrics{.step = 20, .eval_loss = 1.25, .tokens = 10, .seconds = 0.9});
    ledger_->artifact(attempt, {"adapter", (path_ / "adapter/adapter_model.safetensors").string(),
                                20, 12'345'678, std::string(64, 'c')});
    timer.finish(RunStatus::succeeded, 0, "");
  }

  void train(SegmentTimer& timer, MetricsWriter& metrics, std::int64_t first, std::int64_t last) {
    clock_.pass(2'000);
    timer.switch_to(Phase::train);
    for (std::int64_t step = first; step <= last; ++step) {
      clock_.pass(1'000);
      timer.step_done({.step = step, .tokens = 4096, .trained_tokens = 1000, .stall_seconds = 0.1});
      const SegmentTimer::Spent spent = timer.spent();
      metrics.write(StepMetrics{.step = step,
                                .loss = 3.0 / std::sqrt(static_cast<double>(step)),
                                .learning_rate = 1e-4,
                                .grad_norm = 1,
                                .tokens = 4096,
                                .trained_tokens = 1000,
                                .seconds = 1,
                                .tokens_per_second = 4096,
                                .stall_seconds = 0.1,
                                .gpu_hours = spent.gpu_hours(),
                                .usd = spent.usd()});
    }
  }

  fs::path path_;
  std::unique_ptr<Ledger> ledger_;
  std::string run_;
};

TEST_F(ReportTest, summary_holds_plain_figures_of_the_ledger) {
  write_report(*ledger_, run_);
  const Json summary = read_json(path_ / "summary.json");
  const RunTotals totals = ledger_->totals(run_);
  EXPECT_EQ(summary["run"], run_);
  EXPECT_EQ(summary["status"], "succeeded");
  EXPECT_EQ(summary["attempts"], 2);
  EXPECT_EQ(summary["steps"], 20);
  EXPECT_EQ(summary["device_kind"], "cuda");
  EXPECT_NEAR(summary["loss"].get<double>(), 3.0 / std::sqrt(20.0), 1e-8);
  EXPECT_EQ(summary["eval_loss"], 1.25);
  EXPECT_EQ(summary["gpu_hours"].get<double>(), static_cast<double>(totals.device_ms) / 3.6e6);
  EXPECT_EQ(summary["usd"].get<double>(), static_cast<double>(*totals.usd_micros) / 1e6);
  EXPECT_EQ(summary["tokens"], 24 * 4096);
  EXPECT_EQ(summary["useful_tokens"], 20 * 4096);
  EXPECT_EQ(summary["phases"]["lost"]["gpu_hours"].get<double>(), 4 * 4'000 / 3.6e6);
  EXPECT_EQ(summary["planned"]["steps"], 20);
  EXPECT_FALSE(summary["planned"].contains("usd"));
  // The last metrics line and the summary speak of the same run.
  const Metrics metrics = read_metrics(path_ / "metrics.jsonl");
  EXPECT_LE(metrics.steps.back().gpu_hours, summary["gpu_hours"].get<double>());
}

TEST_F(ReportTest, text_is_a_table) {
  RunReport report = read_report(*ledger_, run_);
  const std::string text = report_text(report);
  EXPECT_THAT(text,
              HasSubstr("support <lora> & co   succeeded   2 attempts (1 lost)   run " + run_));
  EXPECT_THAT(text, HasSubstr("4 steps done again"));
  EXPECT_THAT(text, HasSubstr("81,920 useful tokens of 98,304"));
  EXPECT_THAT(text, HasSubstr("budget"));
  report.record.attempts.back().facts.usd_micros_per_device_hour.reset();
  report.totals = total(report.record);
  EXPECT_THAT(report_text(report), HasSubstr("USD unknown: no price is known for attempt 2"));
}

TEST_F(ReportTest, page_is_self_contained_and_escaped) {
  write_report(*ledger_, run_);
  const std::string html = read_text(path_ / "report.html");
  EXPECT_THAT(html, HasSubstr("support &lt;lora&gt; &amp; co"));
  EXPECT_THAT(html, Not(HasSubstr("<lora>")));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, Not(HasSubstr("src=")));
  EXPECT_THAT(html, Not(HasSubstr("href=")));
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_THAT(html, HasSubstr("tokens per second"));
}

TEST_F(ReportTest, a_folder_that_is_gone_costs_only_its_part) {
  fs::remove_all(path_);
  const RunReport report = read_report(*ledger_, run_);
  EXPECT_TRUE(report.metrics.steps.empty());
  EXPECT_EQ(summary_json(report)["steps"], 20);
  EXPECT_THAT(report_html(report), HasSubstr("No steps are recorded"));
  EXPECT_THAT(report_text(report), HasSubstr("total"));
}

TEST_F(ReportTest, listings) {
  EXPECT_EQ(runs_json(nullptr), Json::array());
  EXPECT_EQ(runs_text(nullptr), "no runs yet\n");
  const Json rows = runs_json(ledger_.get());
  ASSERT_EQ(rows.size(), 1U);
  for (const char* key : {"run", "name", "status", "attempts", "gpu_hours", "usd", "started",
                          "device_kind", "output_dir"}) {
    EXPECT_TRUE(rows[0].contains(key)) << key;
  }
  EXPECT_EQ(rows[0]["status"], "succeeded");
  EXPECT_THAT(runs_text(ledger_.get()), HasSubstr(run_.substr(0, 14)));

  const Json run = run_json(ledger_.get(), path_.string() + "/");
  EXPECT_EQ(run["run"], run_);
  EXPECT_EQ(run["attempt_list"].size(), 2U);
  EXPECT_EQ(run["attempt_list"][0]["status"], "lost");
  EXPECT_EQ(run["events"].size(), 2U);
  EXPECT_EQ(export_json(ledger_.get())[0], run_json(ledger_.get(), run_));
  const Error error = error_of([&] { run_json(ledger_.get(), "support lora & co"); });
  EXPECT_THAT(error.parts().mend, HasSubstr("Did you mean 'support <lora> & co'?"));
  EXPECT_EQ(error_of([&] { run_text(nullptr, "x"); }).fault(), Fault::usage);
}

TEST_F(ReportTest, exported_rows_add_up) {
  const std::string csv = export_csv(ledger_.get());
  EXPECT_TRUE(csv.ends_with("\r\n"));
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 1 + 5 + 4)
      << csv;  // load, train, stall, checkpoint, lost; without the last two, evaluate
  EXPECT_THAT(csv, HasSubstr("\"runpod.io/pricing, 2025-04-01\""));
}

TEST(Chart, survives_what_runs_give) {
  const double nan = std::nan("");
  EXPECT_EQ(to_svg({"t", "x", "y", {{"a", "#000", {}, false, false}}, false}), "");
  EXPECT_EQ(to_svg({"t", "x", "y", {{"a", "#000", {{1, nan}}, false, false}}, false}), "");
  for (const double value : {0.0, 1e-12, 3.0, 1e15, -4.0}) {
    const std::string svg = to_svg(
        {"t", "x", "y", {{"a", "#000", {{1, value}, {2, nan}, {3, value}}, false, false}}, false});
    EXPECT_THAT(svg, Not(HasSubstr("nan")));
    EXPECT_THAT(svg, Not(HasSubstr("inf")));
  }
  std::vector<std::pair<double, double>> many;
  for (int i = 0; i < 100'000; ++i) many.emplace_back(i, std::sin(i));
  EXPECT_LT(to_svg({"t", "x", "y", {{"a", "#000", many, false, false}}, false}).size(), 40'000U);
  EXPECT_NEAR(moving_mean(many, 629)[50'000].second, 0, 0.01);
}

}  // namespace
}  // namespace tailor
