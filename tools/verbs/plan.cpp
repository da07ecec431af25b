#include <algorithm>
#include <cmath>
#include <iostream>

#include "base/log.h"
#include "base/text.h"
#include "tools/planning.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

std::string count_of(double value) { return count_text(std::llround(value)); }
std::string bytes_of(double value) { return bytes_text(std::llround(value)); }

/// A figure in the words of its unit; "not known: reason" without a value.
std::string words(const Figure& figure) {
  if (!figure.value) return "not known: " + figure.working;
  const double value = *figure.value;
  if (figure.unit == "bytes") return bytes_of(value);
  if (figure.unit == "usd") return usd_text(std::llround(value * 1e6));
  if (figure.unit == "seconds") return seconds_text(value);
  if (figure.unit == "hours") return seconds_text(value * 3600);
  if (figure.unit == "tokens/s") return number_text(value, 3) + " tokens/s";
  if (value == std::floor(value)) return count_of(value) + " " + figure.unit;
  return number_text(value, 3) + " " + figure.unit;
}

void add_phases(const Plan& plan, bool explain, TextTable& table) {
  for (const JobPhase& phase : plan.phases) {
    const bool apart = !phase.in_hours;
    if (!explain && (!apart || phase.seconds.value_or(0) == 0)) continue;
    std::string text = phase.seconds ? seconds_text(*phase.seconds) : "not known";
    if (phase.seconds && phase.usd) text += ", " + usd_text(std::llround(*phase.usd * 1e6));
    if (explain) text += "   = " + phase.working;
    table.add({(apart ? "before it: " : "of it: ") + phase.name, text});
  }
  const Figure &hours = plan.hours_with_preparation, &usd = plan.usd_with_preparation;
  if (hours.value && (explain || *hours.value > *plan.hours.value)) {
    table.add({"with these", words(hours) + (usd.value ? ", " + words(usd) : "") +
                                 (explain ? "   = " + hours.working + "; " + usd.working : "")});
  }
}

void print_items(const Plan& plan, MemoryItem::Home home, const std::string& name,
                 const Figure& together, bool explain, std::ostream& out) {
  TextTable table({"", ">", ""});
  bool any = false;
  for (const MemoryItem& item : plan.items) {
    if (item.home != home) continue;
    any = true;
    table.add({item.name, bytes_of(item.bytes), explain ? item.working : ""});
  }
  if (!any) return;
  out << "\n" << heading(name) << "  " << words(together) << "\n";
  out << rows_text(table, "  ");
}

void print_plan(const PlannedRecipe& planned, const ResolvedRecipe& recipe, bool explain,
                std::ostream& out) {
  const Plan& plan = planned.plan;
  out << heading(recipe.file.recipe.name) << " on " << planned.machine.name << "\n";
  TextTable table({"", ""});
  const auto row = [&](const std::string& name, const Figure& figure) {
    std::string text = words(figure);
    if (explain && figure.value) text += "   = " + figure.working;
    table.add({name, text});
  };
  table.add({"fits", plan.fits ? "yes" : "no"});
  row("steps", plan.steps);
  row("tokens a step", plan.tokens_per_step);
  row("a step takes", plan.seconds_per_step);
  row("speed", plan.tokens_per_second);
  table.add({"held back by",
             std::string(bound_name(plan.bound)) + (explain ? "   = " + plan.bound_working : "")});
  if (plan.stream_bytes_per_step.value.value_or(0) > 0 || explain) {
    row("streamed a step", plan.stream_bytes_per_step);
    row("compute hides the stream from", plan.crossover_tokens_per_step);
  }
  row("trained", plan.trainable_parameters);
  if (explain) row("work a token", plan.flops_per_token);
  row("time", plan.hours);
  if (explain) row("device hours", plan.gpu_hours);
  row("cost", plan.usd);
  if (explain || std::any_of(plan.tiers.begin(), plan.tiers.end(),
                             [](const TierCost& tier) { return tier.usd.value.has_value(); })) {
    for (const TierCost& tier : plan.tiers) row("  " + tier.tier, tier.usd);
  }
  add_phases(plan, explain, table);
  out << rows_text(table, "  ");
  print_items(plan, MemoryItem::Home::device, "device memory, a rank", plan.device_bytes_peak,
              explain, out);
  print_items(plan, MemoryItem::Home::host, "host memory", plan.host_bytes_peak, explain, out);
  print_items(plan, MemoryItem::Home::disk, "disk", plan.disk_bytes, explain, out);
  if (explain && !plan.differences.empty()) {
    out << "\n" << heading("what the oracle leaves out or takes otherwise") << "\n";
    TextTable terms({"", ">", ""});
    for (const PlanDifference& difference : plan.differences) {
      const bool bytes = difference.unit == "bytes";
      const std::string sign = difference.value < 0 ? "-" : "+";
      const double size = std::abs(difference.value);
      terms.add({difference.name,
                 sign + (bytes ? bytes_of(size) : number_text(size, 3) + " s a step"),
                 difference.working});
    }
    out << rows_text(terms, "  ");
  }
  for (const std::string& warning : plan.warnings) out << "\nnote: " << warning;
  for (const std::string& note : recipe.notes) out << "\nnote: " << note;
  if (!plan.warnings.empty() || !recipe.notes.empty()) out << "\n";
  if (!explain) out << "\n--explain shows how each figure comes about\n";
}

}  // namespace

int run_plan(const PlanArguments& arguments) {
  const ResolvedRecipe recipe = resolve_recipe(arguments.recipe, arguments.overrides);
  const PlannedRecipe planned = plan_recipe(recipe, data_stats(recipe.file.recipe, arguments.data),
                                            Measure::once, arguments.oracle_assumptions);
  if (arguments.json) {
    Json out = plan_json(planned.plan);
    out["recipe"] = recipe.file.name;
    out["name"] = recipe.file.recipe.name;
    out["machine"] = planned.machine.name;
    out["notes"] = recipe.notes;
    std::cout << out.dump(2) << "\n";
  } else {
    print_plan(planned, recipe, arguments.explain, std::cout);
  }
  if (planned.plan.fits) return 0;
  throw does_not_fit(planned.plan);
}

}  // namespace tailor
