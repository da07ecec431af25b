#include <string>
#include <vector>

#include "base/text.h"
#include "data/runs/listing.h"
#include "data/runs/report_words.h"

namespace tailor {
namespace {

/// RFC 4180: quoted where needed, CRLF between records.
class Csv {
 public:
  void add(const std::vector<std::string>& fields) {
    for (std::size_t i = 0; i < fields.size(); ++i) {
      if (i != 0) text_ += ',';
      text_ += quoted(fields[i]);
    }
    text_ += "\r\n";
  }
  const std::string& text() const { return text_; }

 private:
  static std::string quoted(const std::string& field) {
    if (field.find_first_of(",\"\r\n") == std::string::npos) return field;
    std::string out = "\"";
    for (const char c : field) {
      if (c == '"') out += '"';
      out += c;
    }
    return out + "\"";
  }
  std::string text_;
};

std::string usd_field(const std::optional<std::int64_t>& micros) {
  return micros.has_value() ? exact_text(static_cast<double>(*micros) / 1e6) : "";
}

std::string hours_field(std::int64_t device_ms) {
  return exact_text(static_cast<double>(device_ms) / 3.6e6);
}

/// Calls `use(report, attempt, phase, totals of the attempt)` for all that took time.
template <class Use>
void for_each_charge(const Ledger* ledger, const Use& use) {
  for (const RunReport& report : ledger_reports(ledger)) {
    for (const AttemptRecord& attempt : report.record.attempts) {
      const RunTotals totals = total(report.record, attempt.attempt);
      for (const Phase phase : kPhases) {
        if (totals.of(phase).device_ms > 0) use(report, attempt, phase, totals);
      }
    }
  }
}

}  // namespace

std::string export_csv(const Ledger* ledger) {
  Csv csv;
  csv.add({"run",          "name",       "project",
           "run_status",   "attempt",    "attempt_status",
           "began",        "ended",      "launcher",
           "launcher_job", "host",       "device_kind",
           "sku",          "devices",    "usd_per_gpu_hour",
           "price_id",     "price_kind", "price_source",
           "phase",        "gpu_hours",  "usd",
           "estimated",    "base_model", "output_dir"});
  for_each_charge(ledger, [&](const RunReport& report, const AttemptRecord& attempt, Phase phase,
                              const RunTotals& totals) {
    const RunFacts& run = report.record.facts;
    const AttemptFacts& facts = attempt.facts;
    const PhaseTotals& part = totals.of(phase);
    csv.add({run.run,
             run.name,
             run.project,
             std::string(status_name(report.status)),
             std::to_string(attempt.attempt),
             std::string(status_name(attempt.status)),
             utc_text(attempt.began_unix_ms),
             attempt.ended_unix_ms.has_value() ? utc_text(*attempt.ended_unix_ms) : "",
             facts.launcher,
             facts.launcher_job,
             facts.host,
             facts.device_kind,
             facts.sku,
             std::to_string(facts.devices),
             usd_field(facts.usd_micros_per_device_hour),
             facts.price_id,
             facts.price_kind,
             facts.price_source,
             std::string(phase_name(phase)),
             hours_field(part.device_ms),
             usd_field(part.usd_micros),
             attempt.estimated ? "true" : "false",
             run.base_model,
             run.output_dir});
  });
  return csv.text();
}

std::string export_focus_csv(const Ledger* ledger) {
  Csv csv;
  csv.add({"BillingAccountId",
           "BillingAccountName",
           "BillingCurrency",
           "ChargePeriodStart",
           "ChargePeriodEnd",
           "BilledCost",
           "EffectiveCost",
           "ContractedCost",
           "ListCost",
           "ChargeCategory",
           "ChargeClass",
           "ChargeDescription",
           "ChargeFrequency",
           "ConsumedQuantity",
           "ConsumedUnit",
           "PricingQuantity",
           "PricingUnit",
           "ListUnitPrice",
           "ContractedUnitPrice",
           "PricingCategory",
           "ProviderName",
           "PublisherName",
           "InvoiceIssuerName",
           "ResourceId",
           "ResourceName",
           "ResourceType",
           "ServiceCategory",
           "ServiceName",
           "SkuId",
           "SkuPriceId",
           "SubAccountId",
           "x_Phase",
           "x_Attempt",
           "x_RunId"});
  for_each_charge(ledger, [&](const RunReport& report, const AttemptRecord& attempt, Phase phase,
                              const RunTotals& totals) {
    const RunFacts& run = report.record.facts;
    const AttemptFacts& facts = attempt.facts;
    const PhaseTotals& part = totals.of(phase);
    const std::string cost = usd_field(part.usd_micros);
    const std::string price = usd_field(facts.usd_micros_per_device_hour);
    const std::string quantity = hours_field(part.device_ms);
    const std::string provider = facts.price_id.substr(0, facts.price_id.find('/'));
    const bool cpu = facts.device_kind == "cpu";
    const std::string unit = cpu ? "CPU Hours" : "GPU Hours";
    const std::string category = facts.price_kind == "spot"       ? "Dynamic"
                                 : facts.price_kind == "reserved" ? "Committed"
                                                                  : "Standard";
    csv.add({"tailor",
             "Tailor ledger",
             "USD",
             utc_text(attempt.began_unix_ms),
             utc_text(attempt.ended_unix_ms.value_or(attempt.heartbeat_unix_ms)),
             cost,
             cost,
             cost,
             cost,
             "Usage",
             "",
             run.name + ", " + std::string(phase_name(phase)),
             "Usage-Based",
             quantity,
             "GPU Hours",
             quantity,
             "GPU Hours",
             price,
             price,
             category,
             provider,
             provider,
             provider,
             "run/" + run.run + "/attempt/" + std::to_string(attempt.attempt) + "/" + facts.host,
             run.name,
             "GPU",
             "AI and Machine Learning",
             cpu ? "CPU rental" : "GPU rental",
             facts.sku,
             facts.price_id,
             run.project,
             std::string(phase_name(phase)),
             std::to_string(attempt.attempt),
             run.run});
  });
  return csv.text();
}

}  // namespace tailor
