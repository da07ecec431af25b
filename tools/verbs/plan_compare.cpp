#include "tools/verbs/plan_compare.h"

#include <algorithm>
#include <set>

#include "base/text.h"
#include "tools/paths.h"
#include "tools/plan_words.h"
#include "tools/table.h"

namespace tailor {
namespace {

std::string or_dash(const Figure& figure) { return figure.value ? words(figure) : "-"; }

std::string tier_usd(const Plan& plan, const std::string& tier) {
  for (const TierCost& cost : plan.tiers) {
    if (cost.tier == tier) return or_dash(cost.usd);
  }
  return "-";
}

}  // namespace

ResolvedRecipe on_machine(const ResolvedRecipe& recipe, const std::string& profile) {
  ResolvedRecipe out = recipe;
  Recipe& changed = out.file.recipe;
  const std::int64_t rows = changed.global_batch_rows();
  if (profile == "auto") {
    changed.machine.profile.reset();
    changed.machine.ranks = 1;
  } else {
    Machine machine;
    try {
      machine = find_machine(profile, recipes_folder() / "machines");
    } catch (const Error& error) {
      Error::Parts parts = error.parts();
      if (error.fault() == Fault::usage) parts.where = "--on";
      throw Error(error.fault(), std::move(parts));
    }
    changed.machine.profile = profile.ends_with(".yaml") ? profile : machine.name;
    changed.machine.ranks = machine.devices;
  }
  changed.compute.device = DeviceChoice::automatic;
  if (changed.cost.price.kind == PriceChoice::Kind::id) changed.cost.price = {};
  TrainingRecipe& training = changed.training;
  const std::int64_t once = training.micro_batch_size * changed.machine.ranks;
  if (!training.global_batch_rows && rows % once == 0) {
    training.gradient_accumulation_steps = rows / once;
  } else {
    training.global_batch_rows = rows;
  }
  return out;
}

std::string compare_text(const std::vector<ComparedPlan>& plans) {
  TextTable table({"recipe", "machine", "fits", ">tokens/s", "held back by", ">time", ">spot",
                   ">on-demand", ">with download, packing", ">device", ">host"});
  for (const ComparedPlan& compared : plans) {
    const Plan& plan = compared.planned.plan;
    const bool device = plan.device_bytes_peak.value.value_or(0) > 0;
    const Figure& hours = plan.hours_with_preparation;
    table.add({compared.recipe, compared.machine, plan.fits ? "yes" : "no",
               number_text(*plan.tokens_per_second.value, 4), std::string(bound_name(plan.bound)),
               or_dash(plan.hours), tier_usd(plan, "spot"), tier_usd(plan, "on-demand"),
               or_dash(hours) +
                   (plan.usd_with_preparation.value ? ", " + words(plan.usd_with_preparation) : ""),
               device ? words(plan.device_bytes_peak) : "-", words(plan.host_bytes_peak)});
  }
  std::string out = table.text();
  std::set<std::string> said;
  for (const ComparedPlan& compared : plans) {
    const Plan& plan = compared.planned.plan;
    for (const Plan::Misfit& misfit : plan.misfits)
      out += "\n" + compared.recipe + ": " + misfit.what + ". " + misfit.mend;
    if (!plan.hours.value && said.insert(plan.hours.working).second)
      out += "\ntime not known: " + plan.hours.working;
    for (const TierCost& tier : plan.tiers) {
      if (tier.price.usd_micros_per_device_hour) continue;
      if (said.insert(tier.price.reason).second) out += "\n" + tier.price.reason;
    }
  }
  return out + (said.empty() && out.ends_with("\n") ? "" : "\n");
}

Json named_plan_json(const ComparedPlan& compared) {
  Json out = plan_json(compared.planned.plan);
  out["recipe"] = compared.recipe;
  out["machine"] = compared.machine;
  out["ranks"] = compared.ranks;
  out["notes"] = compared.notes;
  return out;
}

Json compare_json(const std::vector<ComparedPlan>& plans) {
  Json list = Json::array();
  for (const ComparedPlan& compared : plans) list.push_back(named_plan_json(compared));
  return {{"plans", std::move(list)}};
}

}  // namespace tailor
