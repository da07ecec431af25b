#include "data/runs/report_words.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "base/text.h"
#include "data/runs/report.h"
#include "data/runs/table.h"

namespace tailor {

std::string attempts_words(const RunReport& report) {
  std::string out = counted(report.totals.attempts, "attempt");
  std::vector<std::string> others;
  for (const RunStatus status : {RunStatus::lost, RunStatus::failed, RunStatus::preempted,
                                 RunStatus::stopped_user, RunStatus::stopped_budget}) {
    const auto& attempts = report.record.attempts;
    const auto count = std::count_if(attempts.begin(), attempts.end(),
                                     [&](const AttemptRecord& a) { return a.status == status; });
    if (count > 0) others.push_back(std::to_string(count) + " " + status_words(status));
  }
  if (!others.empty()) out += " (" + join(others, ", ") + ")";
  return out;
}

std::string status_words(RunStatus status) {
  switch (status) {
    case RunStatus::stopped_user:
      return "stopped";
    case RunStatus::stopped_budget:
      return "stopped by budget";
    default:
      return std::string(status_name(status));
  }
}

std::string phase_words(Phase phase) {
  switch (phase) {
    case Phase::start:
      return "start of the job";
    case Phase::load:
      return "load model";
    case Phase::stall:
      return "wait for weights";
    case Phase::lost:
      return "lost, done again";
    default:
      return std::string(phase_name(phase));
  }
}

std::string device_words(const AttemptFacts& facts) {
  std::string out =
      std::to_string(facts.devices) + " x " + (facts.sku.empty() ? facts.device_kind : facts.sku);
  if (!facts.host.empty()) out += " on " + facts.host;
  if (facts.nodes > 1) out += " and " + counted(facts.nodes - 1, "more host");
  return out;
}

std::string hardware_words(const AttemptFacts& facts) {
  const bool cpu = facts.device_kind == "cpu";
  std::string out = device_words(facts);
  if (facts.usd_micros_per_device_hour.has_value()) {
    out += ", " + usd_text(*facts.usd_micros_per_device_hour) +
           (cpu ? " per device-hour" : " per GPU-hour");
    if (!facts.price_kind.empty()) out += " " + facts.price_kind;
    if (!facts.price_id.empty()) out += " (" + facts.price_id + ")";
  } else {
    out += facts.no_price_reason.empty() ? ", no price known" : ", " + facts.no_price_reason;
  }
  if (cpu) out += "; a rank on the CPU counts as one device";
  return out;
}

std::string hours_heading(const RunReport& report) {
  const auto& attempts = report.record.attempts;
  const bool cpu = !attempts.empty() && attempts.back().facts.device_kind == "cpu";
  return cpu ? "device-hours" : "GPU-hours";
}

std::string percent_text(std::int64_t part, std::int64_t whole) {
  if (whole == 0) return "-";
  return fixed_text(100.0 * static_cast<double>(part) / static_cast<double>(whole), 1) + "%";
}

std::string figure_text(const std::optional<double>& value, const std::string& key) {
  if (!value.has_value()) return "unknown";
  if (key == "usd") return usd_text(std::llround(*value * 1e6));
  if (key == "stream_bytes_per_step" || key == "host_bytes_peak")
    return bytes_text(std::llround(*value));
  if (key == "steps") return count_text(std::llround(*value));
  if (std::abs(*value) >= 1000) return count_text(std::llround(*value));
  return number_text(*value, 4);
}

std::string tokens_words(const RunTotals& totals) {
  std::string out = count_text(totals.useful_tokens) + " useful tokens";
  if (totals.useful_tokens != totals.tokens) out += " of " + count_text(totals.tokens);
  return out + ", " + count_text(totals.useful_trained_tokens) + " of them carry loss";
}

std::string summary_words(const RunReport& report) {
  const RunTotals& totals = report.totals;
  if (totals.attempts == 0) return "No attempt has begun.";
  std::string out = counted(totals.useful_steps, "step") + " over " +
                    count_text(totals.useful_tokens) + " tokens in " +
                    seconds_text(ran_seconds(report)) + ", " + attempts_words(report);
  out += totals.usd_micros ? ", for " + usd_text(*totals.usd_micros) + "." : "; cost unknown.";
  const auto& evals = report.metrics.evals;
  const auto& steps = report.metrics.steps;
  if (evals.size() > 1) {
    const double first = evals.front().eval_loss, last = evals.back().eval_loss;
    out += " Held-out loss " + std::string(last < first ? "fell" : "went") + " from " +
           number_text(first, 4) + " to " + number_text(last, 4) + ".";
  } else if (steps.size() > 1) {
    const double first = steps.front().loss, last = steps.back().loss;
    out += " Training loss " + std::string(last < first ? "fell" : "went") + " from " +
           number_text(first, 4) + " to " + number_text(last, 4) + ".";
  }
  return out;
}

std::string phase_note(const RunReport& report, Phase phase) {
  const RunTotals& totals = report.totals;
  switch (phase) {
    case Phase::train:
      return tokens_words(totals);
    case Phase::load:
      return counted(totals.attempts, "load");
    case Phase::evaluate:
      return report.metrics.evals.empty()
                 ? ""
                 : counted(static_cast<std::int64_t>(report.metrics.evals.size()), "evaluation");
    case Phase::checkpoint: {
      const auto& all = report.record.artifacts;
      const auto count = std::count_if(all.begin(), all.end(), [](const ArtifactRecord& artifact) {
        return artifact.facts.kind == "checkpoint";
      });
      return count == 0 ? "" : counted(count, "checkpoint");
    }
    case Phase::lost:
      return totals.steps > totals.useful_steps
                 ? counted(totals.steps - totals.useful_steps, "step") + " done again"
                 : "";
    default:
      return "";
  }
}

std::string total_note(const RunReport& report) {
  const RunTotals& totals = report.totals;
  std::string out;
  if (totals.busy_device_ms) {
    out = "busy " + number_text(static_cast<double>(*totals.busy_device_ms) / 3.6e6, 4) + " " +
          hours_heading(report) + " (" + percent_text(*totals.busy_device_ms, totals.device_ms) +
          ")";
  }
  if (totals.energy_mj) {
    out += (out.empty() ? "" : "   ") +
           number_text(static_cast<double>(*totals.energy_mj) / 3.6e9, 3) + " kWh";
  }
  return out;
}

std::int64_t usd_micros_per_million(const RunTotals& totals) {
  return std::llround(static_cast<double>(*totals.usd_micros) * 1e6 /
                      static_cast<double>(totals.useful_tokens));
}

std::vector<std::pair<std::string, std::string>> memory_and_energy_words(const RunReport& report) {
  const bool cpu = hours_heading(report) != "GPU-hours";
  const RunTotals& totals = report.totals;
  const std::optional<std::int64_t> host = host_bytes_peak(report);
  const bool ranks =
      !report.record.attempts.empty() && report.record.attempts.back().facts.world_size > 1;
  std::vector<std::pair<std::string, std::string>> out;
  out.emplace_back(
      "Peak host memory",
      host ? bytes_text(*host) + (ranks ? " in the first rank's process" : "") : "not measured");
  out.emplace_back("Peak device memory",
                   cpu ? "none: trained on the CPU, in host memory" : "not measured");
  out.emplace_back("Devices busy", totals.busy_device_ms
                                       ? percent_text(*totals.busy_device_ms, totals.device_ms) +
                                             " of the time they were held"
                                       : "not measured");
  out.emplace_back("Energy",
                   totals.energy_mj
                       ? number_text(static_cast<double>(*totals.energy_mj) / 3.6e9, 4) + " kWh"
                       : "not measured");
  return out;
}

std::string sparkline(const std::vector<double>& values, std::size_t columns) {
  static constexpr std::array kBlocks = {"\u2581", "\u2582", "\u2583", "\u2584",
                                         "\u2585", "\u2586", "\u2587", "\u2588"};
  std::vector<double> finite;
  std::copy_if(values.begin(), values.end(), std::back_inserter(finite),
               [](double value) { return std::isfinite(value); });
  if (finite.empty()) return {};
  columns = std::min(columns, finite.size());
  const auto [low, high] = std::minmax_element(finite.begin(), finite.end());
  std::string out;
  for (std::size_t c = 0; c < columns; ++c) {
    const auto at = [&](std::size_t i) {
      return finite.begin() + static_cast<std::ptrdiff_t>(i * finite.size() / columns);
    };
    const double most = *std::max_element(at(c), at(c + 1));
    const double share = *high > *low ? (most - *low) / (*high - *low) : 0;
    out += kBlocks[std::min(kBlocks.size() - 1,
                            static_cast<std::size_t>(share * static_cast<double>(kBlocks.size())))];
  }
  return out;
}

std::vector<std::string> closing_words(const RunReport& report) {
  const RunTotals& totals = report.totals;
  std::vector<std::string> lines;
  if (totals.usd_micros.has_value() && totals.useful_tokens > 0) {
    lines.push_back("per million useful tokens  " + usd_text(usd_micros_per_million(totals)));
  }
  if (!totals.usd_micros.has_value()) lines.push_back("USD unknown: " + totals.usd_null_reason);
  if (const StreamTotals stream = stream_totals(report); stream.bytes > 0) {
    const Json& plan = report.plan;
    const bool planned = plan.is_object() && plan.contains("bound") && plan["bound"].is_object() &&
                         plan["bound"].contains("value") && plan["bound"]["value"].is_string();
    lines.push_back(
        "weights  " + bytes_text(stream.bytes) + " read from disk; steps waited for " +
        fixed_text(100 * stream.stall_share(), 1) + "% of their time: bound by " + stream.bound() +
        (planned ? " (planned: " + plan["bound"]["value"].get<std::string>() + ")" : ""));
  }
  const RunFacts& facts = report.record.facts;
  if (facts.usd_micros_limit.has_value() && totals.usd_micros.has_value()) {
    lines.push_back("budget  " + usd_text(*totals.usd_micros) + " of " +
                    usd_text(*facts.usd_micros_limit) + " (" +
                    percent_text(*totals.usd_micros, *facts.usd_micros_limit) + ")");
  }
  if (facts.device_ms_limit.has_value()) {
    lines.push_back("budget  " + number_text(totals.gpu_hours(), 4) + " of " +
                    number_text(static_cast<double>(*facts.device_ms_limit) / 3.6e6, 4) + " " +
                    hours_heading(report) + " (" +
                    percent_text(totals.device_ms, *facts.device_ms_limit) + ")");
  }
  if (totals.estimated) {
    lines.push_back(
        "an attempt that ended without a word is counted up to its last heartbeat "
        "(at most 15 s too little)");
  }
  return lines;
}

}  // namespace tailor
