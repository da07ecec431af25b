#include "data/runs/report.h"

#include <gmock/gmock.h>

#include <cmath>

#include "base/text.h"
#include "data/runs/chart.h"
#include "data/runs/listing.h"
#include "data/runs/report_words.h"
#include "data/runs/run_folder.h"
#include "data/runs/segment_timer.h"
#include "data/runs/table.h"
#include "tests/data/runs/runs_fixture.h"
#include "tests/support/page_check.h"
#include "tests/support/synthetic_run.h"

namespace tailor {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing_support::PageCheck;
using testing_support::SteppedClock;
using testing_support::SyntheticRun;

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

TEST_F(ReportTest, page_is_well_formed_and_loads_nothing) {
  write_report(*ledger_, run_);
  const std::string html = read_text(path_ / "report.html");
  const PageCheck page(html);
  EXPECT_THAT(page.problems, IsEmpty());
  EXPECT_THAT(html, HasSubstr("support &lt;lora&gt; &amp; co"));
  EXPECT_THAT(html, Not(HasSubstr("://")));
  for (const char* words :
       {"How it learned", "tokens per second", "Waiting for weights", "Where the GPU-hours went",
        "Cost over time", "Planned and measured", "Memory and energy", "not measured", "Attempts",
        "Recipe", "base_model: tiny-moe"}) {
    EXPECT_THAT(page.text, HasSubstr(words));
  }
  for (const char* drawing : {"aria-label=\"Loss\"", "aria-label=\"Speed\"",
                              "aria-label=\"Cost over time\"", "class=\"mark\"", "class=\"bar\""}) {
    EXPECT_THAT(html, HasSubstr(drawing));
  }
}

// Whatever a name, a recipe, a message or a path holds, it comes out as text.
TEST_F(ReportTest, strings_of_others_stay_text) {
  const std::string evil =
      "</pre></style><script src=\"https://evil.example/x.js\">alert('1')</script>"
      "<img src=x onerror=\"y()\"> &amp; ]]> --> \x01\x1b[31m \xff\xfe \u202Eabc \"' onload=z";
  RunReport report = read_report(*ledger_, run_);
  const auto spoil = [&](std::string& text) { text = evil; };
  RunFacts& facts = report.record.facts;
  for (std::string* text : {&facts.name, &facts.project, &facts.output_dir, &facts.base_model,
                            &facts.recipe_text, &facts.code_version}) {
    spoil(*text);
  }
  for (AttemptRecord& attempt : report.record.attempts) {
    for (std::string* text :
         {&attempt.facts.host, &attempt.facts.sku, &attempt.facts.price_id,
          &attempt.facts.price_kind, &attempt.facts.no_price_reason, &attempt.reason}) {
      spoil(*text);
    }
  }
  for (ArtifactRecord& artifact : report.record.artifacts) {
    spoil(artifact.facts.kind);
    spoil(artifact.facts.path);
    spoil(artifact.facts.sha256);
  }
  for (EventRecord& event : report.record.events) {
    spoil(event.kind);
    spoil(event.text);
  }
  report.plan["bound"]["value"] = evil;
  report.metrics.steps.back().stream_bytes = 1;
  const std::string html = report_html(report);
  const PageCheck page(html);
  EXPECT_THAT(page.problems, IsEmpty());
  EXPECT_THAT(html, HasSubstr("&lt;script src=&quot;https://evil.example"));
  for (const std::string& text : {report_text(report), details_text(report)}) {
    EXPECT_THAT(text, Not(HasSubstr("\x1b")));
    EXPECT_THAT(text, Not(HasSubstr("\u202E")));
    EXPECT_TRUE(is_utf8(text));
  }
}

TEST(PageChecks, find_what_they_look_for) {
  const auto problems = [](const std::string& body) {
    return PageCheck("<!DOCTYPE html><html><body>" + body + "</body></html>").problems;
  };
  EXPECT_THAT(problems("<p class=\"a\">x &amp; y</p>"), IsEmpty());
  for (const char* body :
       {"<script>x</script>", "<p>a & b</p>", "<p>a > b</p>", "<p><b>x</p></b>", "<p>\x01</p>",
        "<p onclick=\"x\">y</p>", "<a href=\"x\">y</a>", "<img src=\"x\"/>", "<p class=a>y</p>",
        "<style>@import 'x'</style>", "<p style=\"background:url(x)\">y</p>", "<p>x"}) {
    EXPECT_THAT(problems(body), Not(IsEmpty())) << body;
  }
}

// 58 layers of 256 experts and steps by the ten thousand: the page stays small, a single spike
// stays seen.
TEST(LongRun, page_is_small_and_keeps_spikes) {
  const fs::path folder =
      fs::path(testing::TempDir()) / ("tailor_long_" + std::to_string(::getpid()));
  fs::remove_all(folder);
  SyntheticRun run;
  run.steps = 1'600;
  run.step_ms = 100;
  SteppedClock clock;
  const std::string id = run.make(folder / "run", (folder / "ledger.db").string(), clock);
  const auto ledger = Ledger::open((folder / "ledger.db").string(), clock);
  const RunReport report = write_report(*ledger, id);
  EXPECT_EQ(report.metrics.steps.size(), 1'600U);
  EXPECT_EQ(report.metrics.experts.size(), 32U);
  const std::string html = read_text(folder / "run/report.html");
  EXPECT_LT(html.size(), 1'500'000U);
  const PageCheck page(html);
  EXPECT_THAT(page.problems, IsEmpty());
  EXPECT_THAT(page.text, HasSubstr("1 value above the axis, the highest 812.5 at step 820."));
  EXPECT_THAT(page.text, HasSubstr("32 sampled steps"));
  fs::remove_all(folder);
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

Chart chart_of(Points points) {
  Chart chart;
  chart.title = "t";
  chart.x_label = "step";
  chart.series.push_back({.label = "a", .colour = "#000", .points = std::move(points)});
  return chart;
}

TEST(Chart, survives_what_runs_give) {
  const double nan = std::nan("");
  EXPECT_EQ(to_figure(chart_of({})), "");
  EXPECT_EQ(to_figure(chart_of({{1, nan}})), "");
  for (const double value : {0.0, 1e-12, 3.0, 1e15, -4.0}) {
    const std::string svg = to_figure(chart_of({{1, value}, {2, nan}, {3, value}}));
    EXPECT_THAT(svg, HasSubstr("<svg"));
    EXPECT_THAT(svg, Not(HasSubstr("nan")));
    EXPECT_THAT(svg, Not(HasSubstr("inf")));
  }
}

TEST(Chart, thinning_keeps_every_pixels_lowest_and_highest) {
  Points many;
  for (int i = 0; i < 100'000; ++i) many.emplace_back(i, std::sin(i));
  const Points smooth = moving_median(many, 629, 401);
  ASSERT_EQ(smooth.size(), 401U);
  EXPECT_EQ(smooth.front(), many.front());
  EXPECT_EQ(smooth.back(), many.back());
  EXPECT_NEAR(smooth[200].second, 0, 0.01);
  EXPECT_EQ(moving_median({{1, 5}, {2, 900}, {3, 7}}, 3, 9), (Points{{1, 5}, {2, 7}, {3, 7}}));
  const std::string plain = to_figure(chart_of(many));
  EXPECT_LT(plain.size(), 60'000U);
  // One point in 100,000 reaches the top of the drawing, at the same place in both.
  many[51'203].second = 40;
  Chart chart = chart_of(many);
  const std::string spiked = to_figure(chart);
  EXPECT_THAT(spiked, HasSubstr(" 30L"));  // y of the upper end
  chart.may_cut = true;
  const std::string cut = to_figure(chart);
  EXPECT_THAT(cut, HasSubstr("1 value above the axis, the highest 40.00 at step 51,203."));
  EXPECT_THAT(cut, HasSubstr("l4 6h-8z"));
  EXPECT_THAT(spiked, Not(HasSubstr("above the axis")));
}

TEST(Text, is_shown_as_one_line_without_controls) {
  EXPECT_EQ(visible_text("a\nb\tc"), "a b c");
  EXPECT_EQ(visible_text("\x1b[2J\xc2\x9b"
                         "31m"),
            "\uFFFD[2J\uFFFD"
            "31m");
  EXPECT_EQ(visible_text("caf\u00e9 \xe9"), "caf\u00e9 \uFFFD");
  EXPECT_EQ(sparkline({1, 1, 9, 1}, 2), "\u2581\u2588");
  EXPECT_EQ(sparkline({}, 5), "");
}

}  // namespace
}  // namespace tailor
