#include "data/runs/metrics.h"

#include <cmath>
#include <limits>

#include "base/json.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

class MetricsTest : public RunsTest {
 protected:
  fs::path path() const { return folder_ / "metrics.jsonl"; }
  static StepMetrics step(std::int64_t number) {
    return {.step = number,
            .loss = 2.0 / 3.0 / static_cast<double>(number),
            .learning_rate = 1e-5,
            .grad_norm = 1.25,
            .tokens = 4096,
            .trained_tokens = 900,
            .seconds = 0.5,
            .tokens_per_second = 8192,
            .stream_bytes = 9'060'000'000,
            .stall_seconds = 0.125,
            .gpu_hours = 0.001,
            .usd = std::nullopt};
  }
};

TEST_F(MetricsTest, a_step_is_one_line_with_nine_digits) {
  EXPECT_EQ(
      to_line(step(1)),
      R"({"step": 1, "loss": 0.666666667, "learning_rate": 1e-05, "grad_norm": 1.25, )"
      R"("tokens": 4096, "trained_tokens": 900, "seconds": 0.5, "tokens_per_second": 8192, )"
      R"("stream_bytes": 9060000000, "stall_seconds": 0.125, "gpu_hours": 0.001, "usd": null})");
  StepMetrics diverged = step(2);
  diverged.loss = std::numeric_limits<double>::quiet_NaN();
  diverged.grad_norm = std::numeric_limits<double>::infinity();
  diverged.usd = 1.5;
  const Json line = parse_json(to_line(diverged), "line");
  EXPECT_TRUE(line["loss"].is_null());
  EXPECT_TRUE(line["grad_norm"].is_null());
  EXPECT_EQ(line["usd"], 1.5);
}

TEST_F(MetricsTest, what_was_written_is_there_at_once_and_reads_back) {
  MetricsWriter writer = MetricsWriter::create(path());
  writer.write(EvalMetrics{.step = 0, .eval_loss = 5.5});
  for (int i = 1; i <= 3; ++i) writer.write(step(i));
  writer.write(EvalMetrics{.step = 3, .eval_loss = 4.5, .tokens = 77});
  writer.sync();
  const Metrics metrics = read_metrics(path());  // the writer still lives
  ASSERT_EQ(metrics.steps.size(), 3U);
  EXPECT_EQ(metrics.steps[2].step, 3);
  EXPECT_NEAR(metrics.steps[2].loss, 2.0 / 9, 1e-9);
  EXPECT_EQ(metrics.steps[2].stream_bytes, 9'060'000'000);
  ASSERT_EQ(metrics.evals.size(), 2U);
  EXPECT_EQ(metrics.evals[1].eval_loss, 4.5);
  EXPECT_EQ(metrics.evals[1].tokens, 77);
  EXPECT_EQ(metrics.broken_lines, 0);
  EXPECT_TRUE(read_metrics(folder_ / "absent").steps.empty());
}

TEST_F(MetricsTest, rows_of_experts_are_a_line_of_their_own) {
  const ExpertMetrics sample{4, {{1, {3, 0, 5}}, {11, {8, 0, 0}}}};
  EXPECT_EQ(to_line(sample), R"({"step": 4, "expert_rows": {"1": [3, 0, 5], "11": [8, 0, 0]}})");
  MetricsWriter writer = MetricsWriter::create(path());
  writer.write(sample);
  writer.write(step(4));
  const Metrics metrics = read_metrics(path());
  EXPECT_EQ(metrics.steps.size(), 1U);
  ASSERT_EQ(metrics.experts.size(), 1U);
  ASSERT_EQ(metrics.experts[0].layers.size(), 2U);
  EXPECT_EQ(metrics.experts[0].layers[1].layer, 11);
  EXPECT_EQ(metrics.experts[0].layers[1].rows, (std::vector<std::int64_t>{8, 0, 0}));
  for (const char* other : {"7", "[]", R"({"a": [1]})", R"({"1": 2})", R"({"1": [-1]})"}) {
    write_atomically(path(), R"({"step": 4, "expert_rows": )" + std::string(other) + "}\n");
    EXPECT_TRUE(read_metrics(path()).experts.empty()) << other;
  }
}

TEST_F(MetricsTest, peak_memory_is_there_where_it_was_measured) {
  StepMetrics measured = step(1);
  measured.host_bytes_peak = 1'234'567;
  EXPECT_EQ(parse_json(to_line(measured), "line")["host_bytes_peak"], 1'234'567);
  write_atomically(path(), to_line(step(1)) + "\n" + to_line(measured) + "\n");
  const Metrics metrics = read_metrics(path());
  EXPECT_FALSE(metrics.steps[0].host_bytes_peak.has_value());
  EXPECT_EQ(metrics.steps[1].host_bytes_peak, 1'234'567);
}

TEST_F(MetricsTest, resuming_cuts_back_to_the_checkpoint) {
  {
    MetricsWriter writer = MetricsWriter::create(path());
    for (int i = 1; i <= 5; ++i) writer.write(step(i));
    writer.write(EvalMetrics{.step = 5, .eval_loss = 1});
    for (int i = 6; i <= 9; ++i) writer.write(step(i));
  }
  const std::string before = read_text(path());
  const std::string through_five = before.substr(0, before.find(R"({"step": 6)"));
  // Whatever a crash leaves of the file's last lines, the result is the same.
  for (std::size_t cut = through_five.size(); cut <= before.size(); cut += 61) {
    write_atomically(path(), before.substr(0, cut));
    MetricsWriter::resume(path(), 5);
    ASSERT_EQ(read_text(path()), through_five) << cut;
  }
  // Cut inside step 5 while the checkpoint says 5: the torn line is dropped.
  const std::size_t fifth = before.find(R"({"step": 5)");
  write_atomically(path(), before.substr(0, fifth + 20));
  MetricsWriter::resume(path(), 5);
  EXPECT_EQ(read_text(path()), before.substr(0, fifth));

  write_atomically(path(), before);
  MetricsWriter writer = MetricsWriter::resume(path(), 5);
  for (int i = 6; i <= 9; ++i) writer.write(step(i));
  EXPECT_EQ(read_text(path()), before);
  MetricsWriter::resume(path(), 0);
  EXPECT_EQ(read_text(path()), "");
}

TEST_F(MetricsTest, damage_is_skipped_and_counted) {
  write_atomically(path(), to_line(step(1)) + "\n" + std::string(4, '\0') + "\n[1]\n" +
                               to_line(step(2)) + "\n{\"step\": 3");
  const Metrics metrics = read_metrics(path());
  EXPECT_EQ(metrics.steps.size(), 2U);
  EXPECT_EQ(metrics.broken_lines, 3);
}

}  // namespace
}  // namespace tailor
