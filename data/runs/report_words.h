#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "data/runs/report.h"

namespace tailor {

/// The report without what only the run's folder knows: folders may be gone, or on another machine.
RunReport ledger_report(const Ledger& ledger, const std::string& run);
/// Of all runs, newest first.
std::vector<RunReport> ledger_reports(const Ledger* ledger);

// How the text report, the page and the listings put things into words.

std::string status_words(RunStatus status);             ///< "stopped by budget"
std::string phase_words(Phase phase);                   ///< "wait for weights"
std::string attempts_words(const RunReport& report);    ///< "2 attempts (1 lost)"
std::string device_words(const AttemptFacts& facts);    ///< "4 x h100-80gb-sxm on n1"
std::string hardware_words(const AttemptFacts& facts);  ///< as before, with the price
std::string hours_heading(const RunReport& report);     ///< "GPU-hours", "device-hours"
std::string tokens_words(const RunTotals& totals);      ///< "47 useful tokens of 48, ..."
std::string percent_text(std::int64_t part, std::int64_t whole);
/// A figure of planned_and_measured() in its unit.
std::string figure_text(const std::optional<double>& value, const std::string& key);
/// What the run came to, in two sentences.
std::string summary_words(const RunReport& report);
/// Beside a phase's time: "47 useful tokens of 48", "2 loads", "4 steps done again"; may be empty.
std::string phase_note(const RunReport& report, Phase phase);
/// Beside the sum: how much of it the devices were busy, and what energy they took.
std::string total_note(const RunReport& report);
std::int64_t usd_micros_per_million(const RunTotals& totals);
/// Cost per token, budget use, what is unknown or estimated: a sentence each.
std::vector<std::string> closing_words(const RunReport& report);
/// Label and value, "not measured" where nothing was.
std::vector<std::pair<std::string, std::string>> memory_and_energy_words(const RunReport& report);
/// How rows fell on the routed experts; empty where nothing was sampled.
std::string expert_words(const RunReport& report);
/// `columns` characters from low to high; each the highest of its stretch, so that spikes stay.
std::string sparkline(const std::vector<double>& values, std::size_t columns);

}  // namespace tailor
