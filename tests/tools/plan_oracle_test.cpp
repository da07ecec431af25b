// `tailor plan --oracle-assumptions` as a user calls it, beside the analytic model's own figures
// for both models, all its machines, formats and homes (tests/oracle/make_plan_golden.py).

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "tests/tools/program.h"

namespace tailor::testing_support {
namespace {

double value_of(const Json& plan, const std::string& name) {
  if (name == "resident_fraction") return plan.at(name).get<double>();
  if (name != "device_used") {
    const Json& value = plan.at(name).at("value");
    return value.is_null() ? std::nan("") : value.get<double>();
  }
  double used = 0;
  for (const Json& item : plan.at("items")) {
    if (item.at("home") == "device" && item.at("name") != "resident experts")
      used += item.at("bytes").get<double>();
  }
  return used;
}

TEST(PlanOracle, the_programs_figures_are_the_oracles) {
  constexpr double kRelative = 1e-6;  // budgets and bytes are whole
  const Sandbox box;
  const Json rows = read_json(fs::path(TAILOR_SOURCE_DIR) / "tests/golden/plan/oracle.json");
  ASSERT_GE(rows.size(), 90U);
  int streamed_from_disk = 0;
  for (const Json& row : rows) {
    SCOPED_TRACE(row.at("recipe").dump() + " " + row.at("keys").dump());
    std::vector<std::string> arguments = {"plan", row.at("recipe").get<std::string>(), "--json",
                                          "--oracle-assumptions"};
    for (const Json& key : row.at("keys")) arguments.push_back(key.get<std::string>());
    const Outcome outcome = run_tailor(box, arguments);
    ASSERT_THAT(outcome.code, testing::AnyOf(0, 66)) << outcome.err;
    const Json plan = Json::parse(outcome.out);
    for (const auto& [name, figure] : row.at("figures").items()) {
      if (name == "bound") {
        const std::string bound = plan.at("bound").at("value").get<std::string>();
        EXPECT_EQ(bound == "link" || bound == "disk", figure == "link") << bound;
        if (bound == "disk") ++streamed_from_disk;
        continue;
      }
      const double oracle = figure.get<double>();
      // The oracle's crossover is a bisection to 32 tokens.
      const double tolerance =
          name == "crossover_tokens_per_step" ? 32 : kRelative * std::max(1.0, std::abs(oracle));
      EXPECT_NEAR(value_of(plan, name), oracle, tolerance) << name;
    }
    EXPECT_TRUE(plan.at("differences").empty());
  }
  EXPECT_GT(streamed_from_disk, 3);
}

}  // namespace
}  // namespace tailor::testing_support
