#include "recipes/plan.h"

#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "recipes/choices.h"
#include "recipes/plan_text.h"
#include "recipes/planner.h"

namespace tailor {
namespace {

constexpr double kCheckpointBytes = 12;  // float32 factor and two moments

}  // namespace

Planner::Planner(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
                 const PlanExtras& extras)
    : recipe_(recipe),
      model_(model),
      machine_(machine),
      extras_(extras),
      lora_(count_lora(
          extras.oracle_assumptions ? scheduled_recipe(recipe, StepSchedule::oracle()) : recipe,
          model)),
      base_(base_bytes(recipe, model)),
      ranks_(recipe.machine.ranks),
      tokens_(as_double(recipe.tokens_per_step())) {
  if (extras.data && extras.data->rows > 0) {
    const double positions = as_double(extras.data->rows * recipe.data.sequence_len);
    const double tokens =
        extras.data->tokens > 0 ? std::min(positions, as_double(extras.data->tokens)) : positions;
    fill_ = tokens / positions;
    loss_share_ = std::min(1.0, as_double(extras.data->trained_tokens) / tokens);
  }
}

void Planner::run(const PriceBook& prices) {
  plan.tokens_per_step = {tokens_, "tokens",
                          whole(as_double(recipe_.global_batch_rows())) + " rows x " +
                              whole(as_double(recipe_.data.sequence_len)) + " tokens"};
  const auto& chosen = recipe_.lora.chosen_experts;
  plan.trainable_parameters = {
      as_double(lora_.total()), "parameters",
      whole(as_double(lora_.other())) + " outside and " + whole(as_double(lora_.experts)) + " in " +
          (chosen ? whole(as_double(chosen->experts)) + " of " +
                        whole(as_double(model_.moe_layers * model_.experts)) + " "
                  : "") +
          "routed experts"};
  const bool has_gpu = machine_.kind == Machine::Kind::cuda;
  if (recipe_.compute.device == (has_gpu ? DeviceChoice::cpu : DeviceChoice::cuda)) {
    throw Error(Fault::usage,
                {"compute.device is " + std::string(choice_word(recipe_.compute.device)) + ", " +
                     machine_.name + " is a machine " + (has_gpu ? "with" : "without") + " GPUs",
                 "compute.device, machine.profile",
                 has_gpu ? "Set compute.device: auto, or machine.profile: cpu."
                         : "Set compute.device: auto, or name a machine.profile with GPUs."});
  }
  if (extras_.oracle_assumptions && !has_gpu) {
    throw Error(Fault::usage,
                {"the oracle knows GPUs only, " + machine_.name + " has none",
                 "--oracle-assumptions", "Leave it out, or set machine.profile: a100-40gb."});
  }
  if (has_gpu) {
    run_gpu();
  } else {
    run_cpu();
  }
  add_disk();
  plan.tokens_per_second = {
      tokens_ * fill_ / *plan.seconds_per_step.value, "tokens/s",
      whole(tokens_ * fill_) + " tokens" +
          (fill_ < 1 ? ", rows " + short_text(100 * fill_) + " % full," : "") + " / " +
          short_text(*plan.seconds_per_step.value) + " s"};
  add_job(prices);
  plan.fits = plan.misfits.empty();
  plan.fits_working =
      plan.fits ? "device, host and disk hold what the items add up to" : plan.misfits.front().what;
}

void Planner::item(Home home, std::string name, double bytes, std::string working) {
  if (bytes > 0) plan.items.push_back({home, std::move(name), bytes, std::move(working)});
}
void Planner::items(Home home, const std::vector<MemoryPart>& parts) {
  for (const MemoryPart& part : parts) item(home, part.name, part.bytes, part.working);
}
double Planner::sum(Home home) const {
  double total = 0;
  for (const MemoryItem& entry : plan.items) {
    if (entry.home == home) total += entry.bytes;
  }
  return total;
}
std::string Planner::sum_text(Home home) const {
  std::vector<std::string> parts;
  for (const MemoryItem& entry : plan.items) {
    if (entry.home == home) parts.push_back(entry.name + " " + gb(entry.bytes));
  }
  return join(parts, " + ");
}
std::string Planner::advice(Home home) const {
  const MemoryItem* largest = nullptr;
  for (const MemoryItem& entry : plan.items) {
    if (entry.home == home && (largest == nullptr || entry.bytes > largest->bytes))
      largest = &entry;
  }
  if (largest == nullptr) return "";
  const std::string start =
      "The largest part is " + largest->name + " with " + gb(largest->bytes) + ". ";
  const std::string& name = largest->name;
  const auto has = [&](std::string_view word) { return name.find(word) != std::string::npos; };
  if (has("workspace")) return start + "Lower training.micro_batch_size or data.sequence_len.";
  if (has("kept") || has("stream") || has("pool")) {
    return start + "Lower training.gradient_accumulation_steps, or set base.activations: disk.";
  }
  if (has("expert factors and optimizer")) {
    return start + "Set lora.expert_state: disk, lower lora.expert_rank, or target fewer modules.";
  }
  if (has("factors"))
    return start + "Lower lora.rank and lora.expert_rank, or target fewer modules.";
  if (has("head")) return start + "Use a device with more memory.";
  if (has("experts")) return start + "Set base.format: int4, or lower base.host_memory.";
  return start + "Set base.non_expert_format: int4, or use a larger device.";
}

void Planner::add_scratch(double value_bytes, double kept) {
  const PagedState state = paged_state(value_bytes);
  const bool paged = plan.expert_state == StateHome::disk;
  const double experts = paged ? as_double(lora_.experts) : 0;
  std::string working;
  if (paged) {
    working =
        whole(experts) + " expert parameters x " + whole(state.traffic) +
        " B: written, gradient, value, moments and copy; read, gradient twice, value, moments "
        "and copy";
    item(Home::disk, "expert state", experts * state.bytes,
         whole(experts) + " parameters x " + whole(state.bytes) +
             " B: float32 value, gradient, two moments, and the copy computed with; scratch, gone "
             "with the run");
  }
  if (kept > 0) {
    working += (working.empty() ? "" : "; ") + gb(kept) + " of layer inputs, written and read";
  }
  plan.scratch_bytes_per_step = {experts * state.traffic + 2 * kept, "bytes",
                                 working.empty() ? "nothing that changes is on disk" : working};
}

void Planner::add_disk() {
  if (packs()) {
    item(Home::disk, "streaming store", base_.all(),
         "packed once into the cache, experts " + std::string(choice_word(recipe_.base.format)));
  }
  const double kept = as_double(std::min<std::int64_t>(recipe_.checkpoint.keep, 1'000'000)) + 1;
  item(Home::disk, "checkpoints", kept * as_double(lora_.total()) * kCheckpointBytes,
       short_text(kept) + " of " + whole(as_double(lora_.total())) +
           " parameters x 12 B (keep, and one being written)");
  item(Home::disk, "adapter", as_double(lora_.other() + lora_.all_experts) * 4,
       lora_.experts == lora_.all_experts
           ? "float32"
           : "float32; experts that are not chosen are zero, since servers want all of them");
  item(Home::disk, "kept layer inputs", kept_on_disk_, "all layers");
  if (extras_.data) item(Home::disk, "token store", as_double(extras_.data->store_bytes), "");
  plan.disk_bytes = {sum(Home::disk), "bytes",
                     sum_text(Home::disk) + "; the model itself not counted"};
  if (machine_.disk_free_bytes && sum(Home::disk) > *machine_.disk_free_bytes) {
    plan.misfits.push_back(
        {"disk: " + gb(sum(Home::disk)) + " needed, " + gb(*machine_.disk_free_bytes) + " free",
         "Free space, lower checkpoint.keep, or set TAILOR_CACHE and output_dir to another "
         "disk."});
  }
}

std::string_view bound_name(Bound bound) {
  switch (bound) {
    case Bound::compute:
      return "compute";
    case Bound::link:
      return "link";
    case Bound::disk:
      return "disk";
    case Bound::network:
      return "network";
  }
  return "?";
}

Plan make_plan(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
               const PriceBook& prices, const PlanExtras& extras) {
  Planner planner(recipe, model, machine, extras);
  planner.run(prices);
  return std::move(planner.plan);
}

Error does_not_fit(const Plan& plan) {
  TAILOR_CHECK(!plan.misfits.empty());
  const Plan::Misfit& first = plan.misfits.front();
  std::string where;
  for (std::size_t i = 1; i < plan.misfits.size(); ++i) {
    if (i > 1) where += "\n";
    where += "also " + plan.misfits[i].what;
  }
  return {Fault::does_not_fit, {first.what, where, first.mend}};
}

}  // namespace tailor
