#include "data/runs/grouping.h"

#include <gmock/gmock.h>

#include <sstream>

#include "base/units.h"
#include "data/runs/listing.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

using testing::HasSubstr;

/// Two runs of two users; the first goes on over midnight of 30 November to 1 December.
class GroupingTest : public RunsTest {
 protected:
  void SetUp() override {
    RunsTest::SetUp();
    ledger_ = open();
    clock_.pass(7 * 86'400'000 + 1'800'000);  // 2026-11-30T23:30Z
    RunFacts facts = run_facts("first");
    facts.project = "team \"a\", b";
    facts.owner = "ada";
    const std::string first = ledger_->begin_run(facts);
    const AttemptId attempt = ledger_->begin_attempt(first, attempt_facts());
    hour(attempt, Phase::train);
    hour(attempt, Phase::evaluate);
    facts = run_facts("second");
    facts.owner = "eve";
    AttemptFacts unpriced = attempt_facts();
    unpriced.usd_micros_per_device_hour.reset();
    const std::string second = ledger_->begin_run(facts);
    hour(ledger_->begin_attempt(second, unpriced), Phase::train);
    hour(ledger_->begin_attempt(second, attempt_facts()), Phase::train);
  }
  void hour(const AttemptId& attempt, Phase phase) {
    clock_.pass(3'600'000);
    const SegmentFacts one{.phase = phase, .ms = 3'600'000};
    ledger_->segments(attempt, std::span(&one, 1));
  }
  std::unique_ptr<Ledger> ledger_;
};

TEST_F(GroupingTest, adds_up_by_day_user_and_project) {
  const auto days = group_costs(ledger_.get(), GroupBy::day);
  ASSERT_EQ(days.size(), 2U);
  EXPECT_EQ(days[0].key, "2026-12-01");
  EXPECT_EQ(days[1].key, "2026-11-30");
  EXPECT_EQ(days[1].device_ms, 4 * 1'800'000);
  EXPECT_EQ(days[0].device_ms, 4 * (1'800'000 + 3'600'000 * 3));
  EXPECT_EQ(days[0].unpriced_device_ms, 4 * 3'600'000);
  EXPECT_EQ(days[0].usd_micros.value() + days[1].usd_micros.value(), 3 * 4 * 2'690'000);
  EXPECT_EQ(days[0].runs, 2);
  const auto users = group_costs(ledger_.get(), GroupBy::user);
  ASSERT_EQ(users.size(), 2U);
  EXPECT_EQ(users[0].key, "ada");
  EXPECT_EQ(users[0].usd_micros, 2 * 4 * 2'690'000);
  EXPECT_EQ(users[1].usd_micros, 4 * 2'690'000);
  EXPECT_EQ(group_costs(ledger_.get(), GroupBy::model).size(), 1U);
  EXPECT_EQ(groups_json(ledger_.get(), GroupBy::project)[1]["project"], "");
  EXPECT_THAT(groups_text(ledger_.get(), GroupBy::project), HasSubstr("(none)"));
  EXPECT_EQ(groups_text(nullptr, GroupBy::day), "no runs yet\n");
}

TEST_F(GroupingTest, parts_of_a_day_add_up_to_the_segment_to_the_micro_dollar) {
  AttemptRecord attempt;
  attempt.facts.devices = 3;
  attempt.began_unix_ms = 1'795'474'800'017;
  SegmentRecord segment;
  segment.from_ms = 5;
  segment.facts.ms = 3 * 86'400'000 + 12'345;
  segment.device_ms = 3 * segment.facts.ms;
  segment.usd_micros = 1'000'003;
  std::int64_t device_ms = 0;
  std::int64_t usd = 0;
  const auto parts = by_day(attempt, segment);
  EXPECT_EQ(parts.size(), 4U);
  for (const DayPart& part : parts) {
    device_ms += part.device_ms;
    usd += part.usd_micros.value();
    EXPECT_GE(part.usd_micros.value(), 0);
  }
  EXPECT_EQ(device_ms, segment.device_ms);
  EXPECT_EQ(usd, segment.usd_micros);
}

/// Fields of one line without line ends in it.
std::vector<std::string> fields_of(const std::string& line) {
  std::vector<std::string> out(1);
  bool quoted = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '"' && quoted && i + 1 < line.size() && line[i + 1] == '"') {
      out.back() += line[++i];
    } else if (line[i] == '"') {
      quoted = !quoted;
    } else if (line[i] == ',' && !quoted) {
      out.emplace_back();
    } else if (line[i] != '\r') {
      out.back() += line[i];
    }
  }
  return out;
}

TEST_F(GroupingTest, focus_has_the_columns_of_its_version_1_0_and_months_that_add_up) {
  const FocusExport out = export_focus(ledger_.get());
  EXPECT_EQ(out.unpriced_device_ms, 4 * 3'600'000);
  std::istringstream text(out.csv);
  std::string line;
  std::getline(text, line);
  const std::vector<std::string> columns = fields_of(line);
  const std::vector<std::string> wanted = {"AvailabilityZone",
                                           "BilledCost",
                                           "BillingAccountId",
                                           "BillingAccountName",
                                           "BillingCurrency",
                                           "BillingPeriodEnd",
                                           "BillingPeriodStart",
                                           "ChargeCategory",
                                           "ChargeClass",
                                           "ChargeDescription",
                                           "ChargeFrequency",
                                           "ChargePeriodEnd",
                                           "ChargePeriodStart",
                                           "CommitmentDiscountCategory",
                                           "CommitmentDiscountId",
                                           "CommitmentDiscountName",
                                           "CommitmentDiscountStatus",
                                           "CommitmentDiscountType",
                                           "ConsumedQuantity",
                                           "ConsumedUnit",
                                           "ContractedCost",
                                           "ContractedUnitPrice",
                                           "EffectiveCost",
                                           "InvoiceIssuerName",
                                           "ListCost",
                                           "ListUnitPrice",
                                           "PricingCategory",
                                           "PricingQuantity",
                                           "PricingUnit",
                                           "ProviderName",
                                           "PublisherName",
                                           "RegionId",
                                           "RegionName",
                                           "ResourceId",
                                           "ResourceName",
                                           "ResourceType",
                                           "ServiceCategory",
                                           "ServiceName",
                                           "SkuId",
                                           "SkuPriceId",
                                           "SubAccountId",
                                           "SubAccountName",
                                           "Tags"};
  ASSERT_GE(columns.size(), wanted.size());
  EXPECT_EQ(std::vector(columns.begin(), columns.begin() + 43), wanted);
  for (std::size_t i = 43; i < columns.size(); ++i) EXPECT_TRUE(columns[i].starts_with("x_"));
  std::map<std::string, double> months;
  int rows = 0;
  while (std::getline(text, line)) {
    const std::vector<std::string> fields = fields_of(line);
    ASSERT_EQ(fields.size(), columns.size());
    std::map<std::string, std::string> row;
    for (std::size_t i = 0; i < fields.size(); ++i) row[columns[i]] = fields[i];
    ++rows;
    months[row["BillingPeriodStart"]] += std::stod(row["BilledCost"]);
    // What FOCUS wants filled in on every row of usage.
    for (const char* column :
         {"BilledCost",         "BillingAccountId", "BillingCurrency",   "BillingPeriodEnd",
          "BillingPeriodStart", "ChargeCategory",   "ChargeDescription", "ChargePeriodEnd",
          "ChargePeriodStart",  "ContractedCost",   "EffectiveCost",     "InvoiceIssuerName",
          "ListCost",           "ProviderName",     "PublisherName",     "ServiceCategory",
          "ServiceName",        "PricingQuantity",  "PricingUnit",       "ListUnitPrice",
          "ContractedUnitPrice"}) {
      EXPECT_FALSE(row[column].empty()) << column;
    }
    EXPECT_GE(row["ChargePeriodStart"], row["BillingPeriodStart"]);
    EXPECT_LE(row["ChargePeriodEnd"], row["BillingPeriodEnd"]);
    EXPECT_TRUE(Json::parse(row["Tags"]).is_object());
    if (row["ResourceName"] == "first") {
      EXPECT_EQ(row["SubAccountId"], "team \"a\", b");
    }
  }
  EXPECT_EQ(rows, 4);  // training on two days, evaluation, the second run
  EXPECT_NEAR(months["2026-11-01T00:00:00Z"], 2 * 2.69, 1e-9);
  EXPECT_NEAR(months["2026-12-01T00:00:00Z"], 10 * 2.69, 1e-9);
}

}  // namespace
}  // namespace tailor
