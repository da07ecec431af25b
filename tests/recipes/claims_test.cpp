// Every figure in docs/claims.md is planned again here: its table rows must be these lines, letter
// by letter. TAILOR_SHOW=1 prints them.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <tuple>

#include "base/text.h"
#include "recipes/step_cost.h"
#include "tests/recipes/planned.h"

namespace tailor {
namespace {

const std::string& document() {
  static const std::string text = read_text(fs::path(TAILOR_SOURCE_DIR) / "docs/claims.md");
  return text;
}

void expect_row(const std::vector<std::string>& cells) {
  const std::string row = "| " + join(cells, " | ") + " |\n";
  if (std::getenv("TAILOR_SHOW") != nullptr) std::printf("%s", row.c_str());
  EXPECT_NE(document().find(row), std::string::npos) << "docs/claims.md lacks the row\n" << row;
}

std::string fixed(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", decimals, value);
  return text;
}
std::string usd(double value) { return "$" + fixed(value, 2); }
std::string whole(double value) { return count_text(std::llround(value)); }
std::string gigabytes(double bytes) { return whole(bytes / 1e9) + " GB"; }

constexpr double kJobTokens = 15'360'000;  // 10,000 samples of 512 tokens, three times

/// The shipped recipe over the job's tokens.
struct Job {
  Plan plan;
  double tokens_per_second() const { return *plan.tokens_per_second.value; }
  /// Samples of 512 tokens, three epochs, that so many hours train, loading taken off.
  double samples(double hours) const {
    double load = 0;
    for (const JobPhase& phase : plan.phases) {
      if (phase.name == "loading") load = *phase.seconds;
    }
    return (hours * 3600 - load) * tokens_per_second() / (3 * 512);
  }
};
Job job(const std::string& recipe, std::vector<std::string> overrides,
        const std::function<void(Machine&)>& change = {}) {
  PlannedRun run = planned_run(recipe, overrides, {}, change);
  const double steps = std::ceil(kJobTokens / static_cast<double>(run.recipe.tokens_per_step()));
  run.recipe.training.max_steps = std::llround(steps);
  Job out{make_plan(run.recipe, run.model, run.machine, shipped_prices(), run.extras)};
  EXPECT_TRUE(out.plan.fits) << recipe << ": " << out.plan.fits_working;
  return out;
}

const std::vector<std::string> kShort = {"training.gradient_accumulation_steps=2"};

TEST(Claims, of_sizes) {
  for (const auto& [recipe, published, small, name] :
       {std::tuple{"maverick-a100", "800 GB", "200 GB", "Maverick"},
        std::tuple{"r1-4xh100", "1,342 GB", "335 GB", "R1"}}) {
    PlannedRun run = planned_run(recipe, {});
    const double parameters = static_cast<double>(run.model.total_parameters());
    const BaseBytes packed = base_bytes(run.recipe, run.model);
    run.recipe.base.format = run.recipe.base.non_expert_format = BaseFormat::as_is;
    const BaseBytes as_is = base_bytes(run.recipe, run.model);
    const bool fp8 = run.model.published == BaseFormat::fp8;
    expect_row({std::string(name) + " is " + published,
                gigabytes(parameters * 2) + " in bfloat16" +
                    (fp8 ? "; published in FP8: " + gigabytes(as_is.all()) : ""),
                fp8 ? "holds for bfloat16, which nobody downloads" : "holds"});
    expect_row({std::string(name) + " is " + small + " at 4 bits",
                gigabytes(packed.routed) + " of experts, " + gigabytes(packed.all()) +
                    " with scales and a bfloat16 vocabulary",
                "holds for the experts alone"});
  }
}

TEST(Claims, of_maverick_on_one_a100) {
  const Job usual = job("maverick-a100", {});
  const auto row = [](const std::string& how, const Job& run) {
    expect_row({how, whole(run.tokens_per_second()), fixed(*run.plan.hours.value, 2) + " h",
                usd(*run.plan.usd.value), whole(run.samples(2)) + " to " + whole(run.samples(4))});
  };
  row("as shipped: 32,768 tokens a step", usual);
  row("at 0.35 of the A100's peak",
      job("maverick-a100", {}, [](Machine& machine) { machine.efficiency = 0.35; }));
  row("at 0.65 of it",
      job("maverick-a100", {}, [](Machine& machine) { machine.efficiency = 0.65; }));
  row("8,192 tokens a step", job("maverick-a100", kShort));
  row("experts from the disk", job("maverick-a100", {"base.host_memory=0"}));
}

TEST(Claims, of_r1_on_h100s) {
  const auto machine = [](int devices, double between) {
    return [=](Machine& changed) {
      changed.host_bytes *= devices / 4.0;
      changed.devices = devices;
      changed.between_devices_bytes_per_second = between;
    };
  };
  const auto row = [](const std::string& how, int devices, const Job& run) {
    const double hour = devices * 2.69;
    expect_row({how, usd(hour), usd(devices * 4.76), whole(run.tokens_per_second()),
                fixed(*run.plan.hours.value, 2) + " h", usd(*run.plan.usd.value),
                whole(run.samples(4))});
    EXPECT_NEAR(*run.plan.usd.value, *run.plan.hours.value * hour, 1e-6);
  };
  row("4, as shipped: 65,536 tokens a step", 4, job("r1-4xh100", {}));
  row("4, 0.20 of the peak", 4,
      job("r1-4xh100", {}, [](Machine& changed) { changed.efficiency = 0.20; }));
  const std::vector<std::string> eight = {"machine.ranks=8",
                                          "training.gradient_accumulation_steps=2"};
  const std::vector<std::string> sixteen = {"machine.ranks=16",
                                            "training.gradient_accumulation_steps=1"};
  row("8, the same step", 8, job("r1-4xh100", eight, machine(8, 370e9)));
  row("16, 50 GB/s between nodes", 16, job("r1-4xh100", sixteen, machine(16, 50e9)));
}

double api(const char* id) {
  const Price* price = shipped_prices().find(id);
  return price == nullptr ? NAN : static_cast<double>(price->usd_micros) / 1e6;
}

TEST(Claims, of_prices) {
  // Three tokens in for one out.
  const auto mixed = [](double in, double out) { return 0.75 * in + 0.25 * out; };
  const auto row = [&](const std::string& what, double day, double per_million) {
    const double tokens = day / per_million * 1e6;
    expect_row({what, usd(day), "$" + fixed(per_million, 4), whole(tokens / 1e6) + " M",
                whole(tokens / 86'400)});
  };
  row("Maverick, 1 A100 at $1.19, low API price", 24 * 1.19,
      mixed(api("api/llama-4/in/low"), api("api/llama-4/out/low")));
  row("Maverick, 1 A100 at $1.19, high API price", 24 * 1.19,
      mixed(api("api/llama-4/in/high"), api("api/llama-4/out/high")));
  row("R1, 4 H100 at $10.76", 24 * 4 * 2.69,
      mixed(api("api/deepseek-r1/in"), api("api/deepseek-r1/out")));

  expect_row({"API use of \"$157 a day\"",
              "at $" + fixed(api("api/llama-4/in/low"), 2) + " a million, $0.157 is " +
                  fixed(0.157 / api("api/llama-4/in/low"), 2) + " M tokens, $157 is " +
                  whole(157 / api("api/llama-4/in/low")) + " M",
              "wrong by 1,000: it is $0.157"});
  expect_row({"4 H100 cost \"$15.12/h\"",
              "4 x $2.69 = " + usd(4 * 2.69) + "; $15.12 would be " + usd(15.12 / 4) + " each",
              "contradicts the article's own $10.76"});
  const ModelFacts model = planned_run("r1-4xh100", {}).model;
  expect_row({"R1 is \"dense\"",
              whole(static_cast<double>(model.experts)) + " experts in " +
                  whole(static_cast<double>(model.moe_layers)) + " of " +
                  whole(static_cast<double>(model.layers)) + " layers, " +
                  whole(static_cast<double>(model.top_k)) + " a token: " +
                  fixed(static_cast<double>(model.active_parameters()) / 1e9, 1) + " of " +
                  whole(static_cast<double>(model.total_parameters()) / 1e9) + " B parameters",
              "wrong"});
}

}  // namespace
}  // namespace tailor
