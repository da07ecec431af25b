#include "recipes/advice.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <type_traits>

#include "recipes/plan_text.h"

namespace tailor {
namespace {

constexpr double kWorthIt = 1.1;  // times faster; less is within what a plan cannot tell
constexpr std::size_t kAdviceMax = 3;
constexpr int kHalvingsMax = 12;

/// A recipe with keys changed, the changes as a user writes them (the last one of a key), and its
/// plan.
struct Variant {
  Recipe recipe;
  std::string what;
  std::vector<std::string> changes;
  Plan plan;

  template <class T>
  void set(const char* key, T& field, const std::type_identity_t<T>& value,
           const std::string& text) {
    field = value;
    const std::string start = std::string(key) + "=";
    std::erase_if(changes, [&](const std::string& other) { return other.starts_with(start); });
    changes.push_back(start + text);
  }
  void set(const char* key, std::int64_t& field, std::int64_t value) {
    set(key, field, value, std::to_string(value));
  }
  void set(const char* key, int& field, int value) {
    set(key, field, value, std::to_string(value));
  }
  /// Rows of a step, by accumulation where they divide.
  void set_rows(std::int64_t rows) {
    TrainingRecipe& training = recipe.training;
    const std::int64_t once = training.micro_batch_size * recipe.machine.ranks;
    if (training.global_batch_rows || rows % once != 0) {
      set("training.global_batch_rows", training.global_batch_rows, rows, std::to_string(rows));
    } else {
      set("training.gradient_accumulation_steps", training.gradient_accumulation_steps,
          rows / once);
    }
  }
};

class Adviser {
 public:
  Adviser(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
          const PriceBook& prices, const PlanExtras& extras, const Plan& plan)
      : recipe_(recipe),
        model_(model),
        machine_(machine),
        prices_(prices),
        extras_(extras),
        plan_(plan) {}

  std::vector<Advice> run() {
    std::vector<Advice> out = plan_.fits ? cheaper() : fitting();
    if (out.size() > kAdviceMax) out.resize(kAdviceMax);
    return out;
  }

 private:
  Variant start(std::string what) const { return {recipe_, std::move(what), {}, {}}; }

  void plan(Variant& variant) const {
    variant.plan = make_plan(variant.recipe, model_, machine_, prices_, extras_);
  }
  /// Plans a variant, over the same tokens.
  void plan_same_tokens(Variant& variant) const {
    auto& steps = variant.recipe.training.max_steps;
    const std::int64_t before = recipe_.tokens_per_step();
    const std::int64_t after = variant.recipe.tokens_per_step();
    if (steps && before != after) {
      const std::int64_t same = (*steps * before + after - 1) / after;
      variant.set("training.max_steps", steps, same, std::to_string(same));
    }
    plan(variant);
  }

  // ---------------------------------------------------------------- what does not fit

  std::vector<Advice> fitting() const {
    std::vector<Variant> found;
    Variant all = start("");  // every change after the other, where none alone suffices
    all.plan = plan_;
    for (const Change& change : changes()) {
      Variant alone = start("");
      if (!make(change, alone)) continue;
      if (alone.plan.fits) found.push_back(std::move(alone));
      if (found.size() == kAdviceMax) break;
      if (found.empty() && !all.plan.fits) make(change, all);
    }
    if (found.empty() && all.plan.fits) found.push_back(std::move(all));
    std::stable_sort(found.begin(), found.end(), [](const Variant& a, const Variant& b) {
      return *a.plan.tokens_per_second.value > *b.plan.tokens_per_second.value;
    });
    std::vector<Advice> out;
    out.reserve(found.size());
    for (const Variant& variant : found) {
      const Plan& then = variant.plan;
      Advice advice;
      advice.changes = variant.changes;
      advice.what = join(variant.changes, " ") + ": fits, " +
                    number_text(*then.tokens_per_second.value, 4) + " tokens/s" +
                    (then.usd.value && *then.tokens_per_step.value == *plan_.tokens_per_step.value
                         ? ", " + usd_text(std::llround(*then.usd.value * 1e6))
                         : "");
      advice.working = "planned again: " + memory_text(then) + ", held back by " +
                       std::string(bound_name(then.bound));
      out.push_back(std::move(advice));
    }
    return out;
  }

  static std::string memory_text(const Plan& plan) {
    const double device = plan.device_bytes_peak.value.value_or(0);
    return (device > 0 ? gb(device) + " on a device, " : std::string()) +
           gb(plan.host_bytes_peak.value.value_or(0)) + " of host memory, " +
           gb(plan.disk_bytes.value.value_or(0)) + " of disk";
  }

  struct Change {
    std::function<bool(Variant&)> once;  ///< whether it changes anything
    int times_max = 1;                   ///< what halves is done again until the plan fits
  };
  /// Makes a change and plans. False where it changes nothing.
  bool make(const Change& change, Variant& variant) const {
    int times = 0;
    for (; times < change.times_max && change.once(variant); ++times) {
      plan(variant);
      if (variant.plan.fits) return true;
    }
    return times > 0;
  }
  /// Changes that take less memory or disk, those that cost least first.
  std::vector<Change> changes() const {
    std::vector<Change> out;
    const auto until_fits = [](std::function<bool(Variant&)> halve) -> Change {
      return {std::move(halve), kHalvingsMax};
    };
    const auto automatic = [](const char* key,
                              std::optional<std::int64_t> BaseRecipe::*field) -> Change {
      return {[=](Variant& variant) {
        if (!(variant.recipe.base.*field)) return false;
        variant.set(key, variant.recipe.base.*field, std::nullopt, "auto");
        return true;
      }};
    };
    out.push_back(automatic("base.device_memory", &BaseRecipe::device_memory));
    out.push_back(automatic("base.host_memory", &BaseRecipe::host_memory));
    out.push_back(until_fits([](Variant& variant) {  // the same step in smaller micro-batches
      TrainingRecipe& training = variant.recipe.training;
      if (training.micro_batch_size % 2 != 0) return false;
      const std::int64_t rows = variant.recipe.global_batch_rows();
      variant.set("training.micro_batch_size", training.micro_batch_size,
                  training.micro_batch_size / 2);
      variant.set_rows(rows);
      return true;
    }));
    out.push_back({[this](Variant& variant) {
      BaseRecipe& base = variant.recipe.base;
      if (model_.experts == 0 || base.format == BaseFormat::int4 || base.store) return false;
      variant.set("base.format", base.format, BaseFormat::int4, "int4");
      return true;
    }});
    out.push_back({[](Variant& variant) {
      BaseRecipe& base = variant.recipe.base;
      if (base.non_expert_format == BaseFormat::int4 || base.store) return false;
      variant.set("base.non_expert_format", base.non_expert_format, BaseFormat::int4, "int4");
      return true;
    }});
    out.push_back({[this](Variant& variant) {
      BaseRecipe& base = variant.recipe.base;
      if (base.activations == ActivationHome::device) {
        variant.set("base.activations", base.activations, ActivationHome::host, "host");
        return true;
      }
      if (plan_.activations == ActivationHome::disk) return false;
      variant.set("base.activations", base.activations, ActivationHome::disk, "disk");
      return true;
    }});
    out.push_back({[this](Variant& variant) {
      if (!variant.recipe.lora.targets.experts || plan_.expert_state == StateHome::disk)
        return false;
      variant.set("lora.expert_state", variant.recipe.lora.expert_state, StateHome::disk, "disk");
      return true;
    }});
    out.push_back(until_fits([](Variant& variant) {
      const std::int64_t rows = variant.recipe.global_batch_rows();
      const std::int64_t once =
          variant.recipe.training.micro_batch_size * variant.recipe.machine.ranks;
      if (rows % 2 != 0 || rows / 2 < once) return false;
      variant.set_rows(rows / 2);
      return true;
    }));
    out.push_back(until_fits([](Variant& variant) {
      auto& rank = variant.recipe.lora.expert_rank;
      if (!variant.recipe.lora.targets.experts || !rank || *rank < 2) return false;
      variant.set("lora.expert_rank", rank, *rank / 2, std::to_string(*rank / 2));
      return true;
    }));
    out.push_back({[](Variant& variant) {
      if (variant.recipe.checkpoint.keep < 2) return false;
      variant.set("checkpoint.keep", variant.recipe.checkpoint.keep, 1);
      return true;
    }});
    out.push_back(until_fits([](Variant& variant) {
      DataRecipe& data = variant.recipe.data;
      if (data.sequence_len < 512) return false;
      variant.set("data.sequence_len", data.sequence_len, data.sequence_len / 2);
      return true;
    }));
    return out;
  }

  // ---------------------------------------------------------------- what is wasteful

  std::vector<Advice> cheaper() const {
    std::vector<Variant> found;
    const auto keep = [&](Variant variant) {
      plan_same_tokens(variant);
      if (variant.plan.fits && faster(variant.plan) >= kWorthIt)
        found.push_back(std::move(variant));
    };
    if (auto larger = larger_steps()) found.push_back(*std::move(larger));
    const BaseRecipe& base = recipe_.base;
    if (model_.experts > 0 && base.format != BaseFormat::int4 && !base.store) {
      Variant variant = start("int4 experts");
      variant.set("base.format", variant.recipe.base.format, BaseFormat::int4, "int4");
      keep(std::move(variant));
    }
    if (base.device_memory || base.host_memory) {
      Variant variant = start("as much of the base in memory as fits");
      if (base.device_memory) {
        variant.set("base.device_memory", variant.recipe.base.device_memory, std::nullopt, "auto");
      }
      if (base.host_memory) {
        variant.set("base.host_memory", variant.recipe.base.host_memory, std::nullopt, "auto");
      }
      keep(std::move(variant));
    }
    if (plan_.activations == ActivationHome::disk) {
      Variant variant = start("layer inputs in RAM");
      variant.set("base.activations", variant.recipe.base.activations, ActivationHome::host,
                  "host");
      keep(std::move(variant));
    }
    if (plan_.expert_state == StateHome::disk) {
      Variant variant = start("state of the experts in RAM");
      variant.set("lora.expert_state", variant.recipe.lora.expert_state, StateHome::memory,
                  "memory");
      keep(std::move(variant));
    }
    if (recipe_.training.eval_every_steps > 0 && !plan_.phases.empty()) {
      Variant variant = start("evaluations a quarter as often");
      variant.set("training.eval_every_steps", variant.recipe.training.eval_every_steps,
                  recipe_.training.eval_every_steps * 4);
      keep(std::move(variant));
    }
    std::stable_sort(found.begin(), found.end(), [&](const Variant& a, const Variant& b) {
      return faster(a.plan) > faster(b.plan);
    });
    std::vector<Advice> out;
    out.reserve(found.size());
    for (const Variant& variant : found) out.push_back(saving(variant));
    return out;
  }

  /// Times faster over the same tokens: of the whole job where its hours are known.
  double faster(const Plan& then) const {
    if (plan_.hours.value && then.hours.value) return *plan_.hours.value / *then.hours.value;
    return *then.tokens_per_second.value / *plan_.tokens_per_second.value;
  }

  /// The step, a power of two times ours, from which twice as many tokens are hardly faster.
  std::optional<Variant> larger_steps() const {
    if (plan_.bound == Bound::compute) return std::nullopt;
    std::optional<Variant> best;
    double speed = *plan_.tokens_per_second.value;
    for (std::int64_t times = 2; times <= 64; times *= 2) {
      Variant variant =
          start(whole(as_double(recipe_.tokens_per_step() * times)) +
                " tokens per step instead of " + whole(as_double(recipe_.tokens_per_step())));
      variant.set_rows(recipe_.global_batch_rows() * times);
      plan_same_tokens(variant);
      const double then = *variant.plan.tokens_per_second.value;
      if (!variant.plan.fits || then < speed * kWorthIt) break;
      speed = then;
      best = std::move(variant);
    }
    return best;
  }

  Advice saving(const Variant& variant) const {
    const Plan& then = variant.plan;
    Advice out;
    out.changes = variant.changes;
    out.times_faster = faster(then);
    const bool hours = plan_.hours.value && then.hours.value;
    const double step_faster = *then.tokens_per_second.value / *plan_.tokens_per_second.value;
    const double shown = step_faster >= kWorthIt ? step_faster : out.times_faster;
    out.what = variant.what + ": " + number_text(shown, 2) + "x faster";
    if (hours) out.hours_saved = *plan_.hours.value - *then.hours.value;
    if (plan_.usd.value && then.usd.value) out.usd_saved = *plan_.usd.value - *then.usd.value;
    if (out.usd_saved) {
      // Of the amounts as they are shown, so that they add up.
      out.what += ", " + cents(shown_usd(*plan_.usd.value) - shown_usd(*then.usd.value)) + " saved";
    } else if (hours) {
      out.what += ", " + seconds_text(*out.hours_saved * 3600) + " saved";
    }
    out.working = "planned again with " + join(variant.changes, " ") + ": " + job_text(then) +
                  "; as it is " + job_text(plan_);
    if (variant.recipe.tokens_per_step() != recipe_.tokens_per_step() && then.steps.value &&
        plan_.steps.value) {
      out.working += "; " + whole(*then.steps.value) + " updates instead of " +
                     whole(*plan_.steps.value) +
                     " from the same tokens, so look at the learning "
                     "rate again";
    }
    return out;
  }
  /// Dollars and cents; of less than ten cents all there is.
  static double shown_usd(double usd) { return usd >= 0.1 ? std::round(usd * 100) / 100 : usd; }
  static std::string cents(double usd) { return usd_text(std::llround(shown_usd(usd) * 1e6)); }
  static std::string job_text(const Plan& plan) {
    std::string out = short_text(*plan.seconds_per_step.value) + " s a step, " +
                      number_text(*plan.tokens_per_second.value, 4) + " tokens/s";
    if (plan.hours.value) out += ", " + short_text(*plan.hours.value) + " h";
    if (plan.usd.value) out += ", " + cents(*plan.usd.value);
    return out;
  }

  const Recipe& recipe_;
  const ModelFacts& model_;
  const Machine& machine_;
  const PriceBook& prices_;
  const PlanExtras& extras_;
  const Plan& plan_;
};

}  // namespace

std::vector<Advice> advise(const Recipe& recipe, const ModelFacts& model, const Machine& machine,
                           const PriceBook& prices, const PlanExtras& extras, const Plan& plan) {
  return Adviser(recipe, model, machine, prices, extras, plan).run();
}

}  // namespace tailor
