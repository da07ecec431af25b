#include <algorithm>
#include <cmath>
#include <iostream>

#include "base/log.h"
#include "base/text.h"
#include "tools/plan_words.h"
#include "tools/planning.h"
#include "tools/step_memo.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"
#include "tools/verbs/plan_compare.h"

namespace tailor {
namespace {

std::string bytes_of(double value) { return bytes_text(std::llround(value)); }

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
  if (!plan.advice.empty()) {
    out << "\n" << heading(plan.fits ? "would be cheaper" : "would fit") << "\n";
    for (const Advice& advice : plan.advice) {
      out << "  " << advice.what << "\n";
      if (plan.fits) out << "    " << join(advice.changes, " ") << "\n";
      if (explain) out << "    = " << advice.working << "\n";
    }
  }
  for (const std::string& warning : plan.warnings) out << "\nnote: " << warning;
  for (const std::string& note : recipe.notes) out << "\nnote: " << note;
  if (!plan.warnings.empty() || !recipe.notes.empty()) out << "\n";
  if (!explain) out << "\n--explain shows how each figure comes about\n";
}

/// Words without '=' among the overrides are further recipes.
std::vector<std::string> split_recipes(const PlanArguments& arguments,
                                       std::vector<std::string>& overrides) {
  std::vector<std::string> recipes = {arguments.recipe};
  for (const std::string& word : arguments.overrides)
    (word.find('=') == std::string::npos ? recipes : overrides).push_back(word);
  return recipes;
}

void refuse_probe_of_other_machines(const PlanArguments& arguments) {
  if (!arguments.probe || arguments.on.empty()) return;
  throw Error(Fault::usage,
              {"--probe measures this machine, --on asks for others", "the command line",
               "Leave one of them out: what --probe measured stays known, and --on auto,a100-40gb "
               "compares with it afterwards."});
}

/// Measures the recipe's own steps, where the plan of this machine says that it fits here at all.
void probe(const std::string& name, const std::vector<std::string>& overrides,
           const ResolvedRecipe& recipe, const std::optional<DataStats>& data) {
  if (const auto& profile = recipe.file.recipe.machine.profile) {
    throw Error(Fault::usage,
                {"--probe measures this machine, the recipe is planned for " + *profile,
                 "machine.profile", "Set machine.profile=auto, or leave --probe out."});
  }
  if (plan_recipe(recipe, data, Measure::never).plan.fits) measure_step(name, overrides);
}

std::vector<std::string> machines_of(const std::string& on) {
  if (on.empty()) return {};
  std::vector<std::string> names;
  for (const std::string& part : split(on, ',')) {
    const std::string name(trim(part));
    if (name.empty()) {
      throw Error(Fault::usage, {"--on has an empty name in '" + on + "'", "the command line",
                                 "Name machine profiles: --on a100-40gb,4xh100."});
    }
    names.push_back(name);
  }
  return names;
}

}  // namespace

int run_plan(const PlanArguments& arguments) {
  refuse_probe_of_other_machines(arguments);
  std::vector<std::string> overrides;
  const std::vector<std::string> recipes = split_recipes(arguments, overrides);
  const std::vector<std::string> machines = machines_of(arguments.on);
  const bool several = recipes.size() > 1 || !machines.empty();
  std::vector<ComparedPlan> plans;
  std::optional<ResolvedRecipe> only;
  for (const std::string& name : recipes) {
    const ResolvedRecipe recipe = resolve_recipe(name, overrides);
    const std::optional<DataStats> data =
        data_stats(recipe.file.recipe, arguments.data    ? CountData::always
                                       : arguments.probe ? CountData::if_small
                                                         : CountData::for_steps);
    if (arguments.probe) probe(name, overrides, recipe, data);
    const auto add = [&](const ResolvedRecipe& on) {
      PlanChoices choices;
      choices.measure = Measure::once;
      choices.oracle_assumptions = arguments.oracle_assumptions;
      choices.advice = !several;
      ComparedPlan plan{on.file.recipe.name, "", on.file.recipe.machine.ranks,
                        plan_recipe(on, data, choices), on.notes};
      plan.machine = plan.planned.machine.name;
      plans.push_back(std::move(plan));
    };
    if (machines.empty()) add(recipe);
    for (const std::string& machine : machines) add(on_machine(recipe, machine));
    if (!several) only = recipe;
  }
  if (several) {
    if (arguments.json) {
      std::cout << compare_json(plans).dump(2) << "\n";
    } else {
      std::cout << compare_text(plans);
    }
    const bool any = std::any_of(plans.begin(), plans.end(),
                                 [](const ComparedPlan& plan) { return plan.planned.plan.fits; });
    return any ? 0 : static_cast<int>(Fault::does_not_fit);
  }
  if (arguments.json) {
    Json out = named_plan_json(plans.front());
    out["recipe"] = only->file.name;
    out["name"] = only->file.recipe.name;
    std::cout << out.dump(2) << "\n";
  } else {
    print_plan(plans.front().planned, *only, arguments.explain, std::cout);
  }
  if (plans.front().planned.plan.fits) return 0;
  throw does_not_fit(plans.front().planned.plan);
}

}  // namespace tailor
