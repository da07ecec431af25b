#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/clock.h"
#include "base/file.h"
#include "data/runs/ledger.h"
#include "data/runs/metrics.h"
#include "data/runs/run_folder.h"
#include "data/runs/segment_timer.h"

namespace tailor::testing_support {

/// A clock that its owner moves.
class SteppedClock final : public Clock {
 public:
  std::int64_t unix_ms() const override { return 1'795'474'800'000 + ms_; }
  std::int64_t steady_ms() const override { return 5'000 + ms_; }
  void pass(std::int64_t ms) { ms_ += ms; }

 private:
  std::int64_t ms_ = 0;
};

/// A run as the books of a real one would have it, made of formulas: attempts that were killed and
/// went on from a checkpoint, stalls, spikes, evaluations, samples of expert load.
struct SyntheticRun {
  std::int64_t steps = 100'000, step_ms = 1'000;
  int attempts = 4;
  int layers = 58, experts = 256;
  std::string name = "r1-support-lora", recipe = "name: r1-support-lora\n";

  /// Highest loss, of one step alone.
  static constexpr double kSpike = 812.5;
  std::int64_t spike_step() const { return steps / 2 + steps / 80; }

  static double noise(std::int64_t i) {
    const double x = std::sin(static_cast<double>(i) * 12.9898) * 43758.5453;
    return x - std::floor(x);
  }

  ExpertMetrics expert_sample(std::int64_t step) const {
    ExpertMetrics out{step, {}};
    for (int l = 0; l < layers; ++l) {
      ExpertMetrics::Layer layer{3 + l, {}};
      for (int e = 0; e < experts; ++e) {
        const double pull = 4 * noise(l * 1'000 + e) - 2;
        const double rows = 250 * std::exp(pull) * (0.8 + 0.4 * noise(step + l * 7 + e));
        layer.rows.push_back(noise(l * 77 + e * 3) < 0.01 ? 0 : std::llround(rows));
      }
      out.layers.push_back(layer);
    }
    return out;
  }

  void train(SteppedClock& clock, SegmentTimer& timer, MetricsWriter& metrics, std::int64_t first,
             std::int64_t last) const {
    timer.switch_to(Phase::train);
    for (std::int64_t step = first; step <= last; ++step) {
      const bool stalls = noise(step * 5) < 0.05;
      const std::int64_t ms =
          step_ms + static_cast<std::int64_t>(0.1 * static_cast<double>(step_ms) * noise(step)) +
          (stalls ? step_ms / 2 : 0);
      clock.pass(ms);
      const double seconds = static_cast<double>(ms) / 1000;
      const double stall = stalls ? static_cast<double>(step_ms) / 2000 : 0;
      timer.step_done({step, 32'768, 9'000, stall});
      timer.tick();
      const double x = static_cast<double>(step) / static_cast<double>(steps);
      const SegmentTimer::Spent spent = timer.spent();
      metrics.write(StepMetrics{.step = step,
                                .loss = step == spike_step()
                                            ? kSpike
                                            : 0.7 + 2.4 * std::exp(-9 * x) + 0.25 * noise(step * 3),
                                .learning_rate = 1e-4 * (1 - x),
                                .grad_norm = 0.5 + noise(step * 11),
                                .tokens = 32'768,
                                .trained_tokens = 9'000,
                                .seconds = seconds,
                                .tokens_per_second = 32'768 / seconds,
                                .stream_bytes = 40'000'000'000,
                                .stall_seconds = stall,
                                .host_bytes_peak = 350'000'000'000 + step,
                                .gpu_hours = spent.gpu_hours(),
                                .usd = spent.usd()});
      if (step % std::max<std::int64_t>(1, steps / 32) == 1) metrics.write(expert_sample(step));
      if (step % std::max<std::int64_t>(1, steps / 50) != 0) continue;
      timer.switch_to(Phase::evaluate);
      clock.pass(20 * step_ms);
      metrics.write(EvalMetrics{.step = step,
                                .eval_loss = 0.85 + 2.2 * std::exp(-9 * x),
                                .tokens = 90'000,
                                .seconds = static_cast<double>(20 * step_ms) / 1000});
      timer.switch_to(Phase::checkpoint);
      clock.pass(5 * step_ms);
      timer.switch_to(Phase::train);
    }
  }

  /// Writes run folder and ledger below `folder`; returns the run's identifier.
  std::string make(const fs::path& folder, const std::string& ledger_place,
                   SteppedClock& clock) const {
    const auto ledger = Ledger::open(ledger_place, clock);
    RunFolder made = RunFolder::open(folder, false, clock);
    write_atomically(made.plan(), R"({"steps": {"value": )" + std::to_string(steps) +
                                      R"(, "unit": "steps", "working": ""},
        "seconds_per_step": {"value": 0.9, "unit": "s", "working": ""},
        "tokens_per_second": {"value": 36400, "unit": "tokens/s", "working": ""},
        "stream_bytes_per_step": {"value": 40000000000, "unit": "bytes", "working": ""},
        "bound": {"value": "compute", "unit": "resource", "working": ""},
        "usd": {"value": 320, "unit": "USD", "working": ""}})");
    RunFacts facts;
    facts.run = made.run();
    facts.name = name;
    facts.project = "support";
    facts.output_dir = made.path().string();
    facts.base_model = "deepseek-ai/DeepSeek-R1";
    facts.recipe_text = recipe;
    facts.code_version = "0.1.0";
    facts.usd_micros_limit = 400'000'000;
    ledger->begin_run(facts);
    std::int64_t done = 0;
    for (int a = 1; a <= attempts; ++a) {
      AttemptFacts attempt;
      attempt.host = "n1";
      attempt.device_kind = "cuda";
      attempt.sku = "h100-80gb-sxm";
      attempt.world_size = attempt.devices = 4;
      attempt.usd_micros_per_device_hour = 2'690'000;
      attempt.price_id = "runpod/h100-80gb-sxm/on-demand/2025-04-01";
      attempt.price_kind = "on-demand";
      attempt.resumed_from_step = done;
      attempt.held_ms_before = 4 * step_ms;
      MetricsWriter metrics = done == 0 ? MetricsWriter::create(made.metrics())
                                        : MetricsWriter::resume(made.metrics(), done);
      const AttemptId id = ledger->begin_attempt(facts.run, attempt);
      std::optional<SegmentTimer> timer(std::in_place, *ledger, id, Phase::load,
                                        SegmentTimer::Heartbeats::by_hand);
      clock.pass(300 * step_ms);
      const std::int64_t last = a == attempts ? steps : steps * a / attempts + steps / 100;
      train(clock, *timer, metrics, done + 1, last);
      done = a == attempts ? steps : steps * a / attempts;
      ledger->artifact(
          id, {"checkpoint", (made.path() / ("checkpoints/step-" + std::to_string(done))).string(),
               done, 3'000'000'000, std::string(64, 'a')});
      if (a == attempts) {
        ledger->artifact(
            id, {"adapter", (made.path() / "adapter/adapter_model.safetensors").string(), steps,
                 1'234'567'890, std::string(64, 'c')});
        timer->finish(RunStatus::succeeded, 0, "");
      } else {
        timer->flush();
        timer.reset();  // and then it is killed
        ledger->event(id, last, "signal", "SIGTERM: preempted");
        clock.pass(2'000 * step_ms);
      }
    }
    return facts.run;
  }
};

}  // namespace tailor::testing_support
