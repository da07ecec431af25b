#include <cmath>

#include "recipes/plan.h"

namespace tailor {
namespace {

Json figure_json(const Figure& figure) {
  Json value = nullptr;
  if (figure.value && std::isfinite(*figure.value)) {
    const bool counted = figure.unit == "bytes" || figure.unit == "tokens" ||
                         figure.unit == "steps" || figure.unit == "parameters";
    if (counted) {
      value = std::llround(*figure.value);
    } else {
      value = *figure.value;
    }
  }
  return {{"value", value}, {"unit", figure.unit}, {"working", figure.working}};
}

Json number_or_null(const std::optional<double>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json phases_json(const Plan& plan) {
  Json out = Json::array();
  for (const JobPhase& phase : plan.phases) {
    out.push_back({{"name", phase.name},
                   {"in_hours", phase.in_hours},
                   {"hours", phase.seconds ? Json(*phase.seconds / 3600) : Json(nullptr)},
                   {"usd", number_or_null(phase.usd)},
                   {"working", phase.working}});
  }
  return out;
}

Json tiers_json(const Plan& plan) {
  Json out = Json::array();
  for (const TierCost& tier : plan.tiers) {
    const auto& micros = tier.price.usd_micros_per_device_hour;
    out.push_back(
        {{"tier", tier.tier},
         {"id", tier.price.id},
         {"usd_per_gpu_hour", micros ? Json(static_cast<double>(*micros) / 1e6) : Json(nullptr)},
         {"usd", figure_json(tier.usd)},
         {"usd_with_preparation", figure_json(tier.usd_with_preparation)}});
  }
  return out;
}

Json advice_json(const Plan& plan) {
  Json out = Json::array();
  for (const Advice& advice : plan.advice) {
    out.push_back({{"what", advice.what},
                   {"changes", advice.changes},
                   {"times_faster", advice.times_faster > 0 ? Json(advice.times_faster) : Json()},
                   {"hours_saved", number_or_null(advice.hours_saved)},
                   {"usd_saved", number_or_null(advice.usd_saved)},
                   {"working", advice.working}});
  }
  return out;
}

}  // namespace

Json plan_json(const Plan& plan) {
  Json out;
  out["fits"] = {{"value", plan.fits}, {"unit", "boolean"}, {"working", plan.fits_working}};
  out["device_bytes_peak"] = figure_json(plan.device_bytes_peak);
  out["host_bytes_peak"] = figure_json(plan.host_bytes_peak);
  out["disk_bytes"] = figure_json(plan.disk_bytes);
  out["stream_bytes_per_step"] = figure_json(plan.stream_bytes_per_step);
  out["scratch_bytes_per_step"] = figure_json(plan.scratch_bytes_per_step);
  out["expert_state"] = plan.expert_state == StateHome::disk ? "disk" : "memory";
  out["tokens_per_step"] = figure_json(plan.tokens_per_step);
  out["seconds_per_step"] = figure_json(plan.seconds_per_step);
  out["tokens_per_second"] = figure_json(plan.tokens_per_second);
  out["crossover_tokens_per_step"] = figure_json(plan.crossover_tokens_per_step);
  out["steps"] = figure_json(plan.steps);
  out["hours"] = figure_json(plan.hours);
  out["gpu_hours"] = figure_json(plan.gpu_hours);
  out["usd"] = figure_json(plan.usd);
  out["hours_with_preparation"] = figure_json(plan.hours_with_preparation);
  out["usd_with_preparation"] = figure_json(plan.usd_with_preparation);
  out["phases"] = phases_json(plan);
  out["tiers"] = tiers_json(plan);
  out["bound"] = {
      {"value", bound_name(plan.bound)}, {"unit", "resource"}, {"working", plan.bound_working}};
  out["flops_per_token"] = figure_json(plan.flops_per_token);
  out["trainable_parameters"] = figure_json(plan.trainable_parameters);
  out["resident_fraction"] = plan.resident_fraction;
  out["price"] = {{"id", plan.price.id}, {"kind", plan.price.kind}, {"source", plan.price.source}};
  Json items = Json::array();
  for (const MemoryItem& item : plan.items) {
    const char* home = item.home == MemoryItem::Home::device ? "device"
                       : item.home == MemoryItem::Home::host ? "host"
                                                             : "disk";
    items.push_back({{"home", home},
                     {"name", item.name},
                     {"bytes", std::llround(item.bytes)},
                     {"working", item.working}});
  }
  out["items"] = std::move(items);
  Json misfits = Json::array();
  for (const Plan::Misfit& misfit : plan.misfits)
    misfits.push_back({{"what", misfit.what}, {"mend", misfit.mend}});
  out["misfits"] = std::move(misfits);
  Json differences = Json::array();
  for (const PlanDifference& difference : plan.differences) {
    Json entry = {{"name", difference.name}, {"working", difference.working}};
    if (difference.unit == "bytes") {
      entry["bytes"] = std::llround(difference.value);
    } else {
      entry[difference.unit] = difference.value;
    }
    differences.push_back(std::move(entry));
  }
  out["differences"] = std::move(differences);
  out["advice"] = advice_json(plan);
  out["warnings"] = plan.warnings;
  return out;
}

}  // namespace tailor
