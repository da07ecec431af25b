#include <array>
#include <chrono>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "base/clock.h"
#include "base/json.h"
#include "base/text.h"
#include "data/runs/csv.h"
#include "data/runs/grouping.h"
#include "data/runs/listing.h"

namespace tailor {
namespace {

/// Those of FOCUS 1.0 in its own (alphabetical) order, then ours, which begin with x_.
constexpr std::array kColumns = {"AvailabilityZone",
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
                                 "Tags",
                                 "x_Attempt",
                                 "x_Phase",
                                 "x_RunId"};

std::string usd_text_exact(std::int64_t micros) {
  return exact_text(static_cast<double>(micros) / 1e6);
}

/// First day of the month of a day since 1970, and of the next one.
std::pair<std::string, std::string> month_of(std::int64_t day) {
  const std::chrono::year_month_day date{std::chrono::sys_days{std::chrono::days{day}}};
  const std::chrono::year_month month = date.year() / date.month();
  const auto first = [](std::chrono::year_month of) {
    const auto days = std::chrono::sys_days{of / std::chrono::day{1}}.time_since_epoch();
    return utc_text(std::int64_t{days.count()} * 86'400'000);
  };
  return {first(month), first(month + std::chrono::months{1})};
}

/// What one row adds up.
struct Charge {
  std::int64_t from_unix_ms = 0, to_unix_ms = 0, device_ms = 0, usd_micros = 0;
};

std::map<std::string, std::string> row_of(const RunFacts& run, const AttemptRecord& attempt,
                                          std::int64_t day, Phase phase, const Charge& charge) {
  const AttemptFacts& facts = attempt.facts;
  const bool cpu = facts.device_kind == "cpu";
  const std::string cost = usd_text_exact(charge.usd_micros);
  const std::string rate = usd_text_exact(facts.usd_micros_per_device_hour.value_or(0));
  const std::string hours = exact_text(static_cast<double>(charge.device_ms) / 3.6e6);
  const std::string unit = cpu ? "CPU Hours" : "GPU Hours";
  const std::size_t slash = facts.price_id.find('/');
  // A price out of the recipe says nothing of who is paid.
  const std::string provider =
      slash == std::string::npos ? "unknown" : facts.price_id.substr(0, slash);
  const auto [month, next_month] = month_of(day);
  Json tags = {{"base_model", run.base_model}, {"run_name", run.name}};
  if (!run.project.empty()) tags["project"] = run.project;
  if (!run.owner.empty()) tags["user"] = run.owner;
  return {{"BilledCost", cost},
          {"BillingAccountId", "tailor"},
          {"BillingAccountName", "Tailor ledger"},
          {"BillingCurrency", "USD"},
          {"BillingPeriodEnd", next_month},
          {"BillingPeriodStart", month},
          {"ChargeCategory", "Usage"},
          {"ChargeDescription", run.name + ", " + std::string(phase_name(phase)) + " on " +
                                    std::to_string(facts.devices) + " x " + facts.sku},
          {"ChargeFrequency", "Usage-Based"},
          {"ChargePeriodEnd", utc_text(charge.to_unix_ms + 999)},
          {"ChargePeriodStart", utc_text(charge.from_unix_ms)},
          {"ConsumedQuantity", hours},
          {"ConsumedUnit", unit},
          {"ContractedCost", cost},
          {"ContractedUnitPrice", rate},
          {"EffectiveCost", cost},
          {"InvoiceIssuerName", provider},
          {"ListCost", cost},
          {"ListUnitPrice", rate},
          {"PricingCategory", facts.price_kind == "spot"       ? "Dynamic"
                              : facts.price_kind == "reserved" ? "Committed"
                                                               : "Standard"},
          {"PricingQuantity", hours},
          {"PricingUnit", unit},
          {"ProviderName", provider},
          {"PublisherName", provider},
          {"ResourceId",
           "run/" + run.run + "/attempt/" + std::to_string(attempt.attempt) + "/" + facts.host},
          {"ResourceName", run.name},
          {"ResourceType", cpu ? "CPU" : "GPU"},
          {"ServiceCategory", "AI and Machine Learning"},
          {"ServiceName", cpu ? "CPU rental" : "GPU rental"},
          {"SkuId", facts.sku},
          {"SkuPriceId", facts.price_id},
          {"SubAccountId", run.project},
          {"SubAccountName", run.project},
          {"Tags", tags.dump()},
          {"x_Attempt", std::to_string(attempt.attempt)},
          {"x_Phase", std::string(phase_name(phase))},
          {"x_RunId", run.run}};
}

}  // namespace

FocusExport export_focus(const Ledger* ledger) {
  FocusExport out;
  Csv csv;
  csv.add(std::vector<std::string>(kColumns.begin(), kColumns.end()));
  for (const std::string& run : ledger != nullptr ? ledger->runs() : std::vector<std::string>()) {
    const RunRecord record = ledger->read(run);
    std::map<std::tuple<int, std::int64_t, Phase>, Charge> charges;
    for (const SegmentRecord& segment : record.segments) {
      if (!segment.usd_micros) {
        out.unpriced_device_ms += segment.device_ms;
        continue;
      }
      for (const DayPart& part : by_day(record.attempt_of(segment.attempt), segment)) {
        Charge& charge = charges[{segment.attempt, part.day, segment.facts.phase}];
        if (charge.to_unix_ms == 0) charge.from_unix_ms = part.from_unix_ms;
        charge.to_unix_ms = part.to_unix_ms;
        charge.device_ms += part.device_ms;
        charge.usd_micros += part.usd_micros.value_or(0);
      }
    }
    for (const auto& [key, charge] : charges) {
      const auto& [number, day, phase] = key;
      const auto row = row_of(record.facts, record.attempt_of(number), day, phase, charge);
      std::vector<std::string> fields;
      for (const char* column : kColumns) {
        const auto found = row.find(column);
        fields.push_back(found == row.end() ? "" : found->second);
      }
      csv.add(fields);
    }
  }
  out.csv = csv.text();
  return out;
}

}  // namespace tailor
