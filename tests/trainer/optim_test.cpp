// AdamW, clipping and learning rates against plain loops in double and numbers torch gave.

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/random.h"
#include "tests/support/fixture.h"
#include "trainer/optim/adamw.h"
#include "trainer/optim/schedule.h"

namespace tailor {
namespace {

using testing_support::golden;

Adapter small_adapter(const std::vector<std::string>& targets) {
  LoraOptions options;
  options.rank = 3;
  options.targets = targets;
  return Adapter::create(read_model_spec(golden("llama_tiny/model")), options, 1);
}

float random_number(std::uint64_t name, std::size_t i) {
  return static_cast<float>(2 * random_unit(name, RandomStream::sample, i) - 1);
}

TEST(AdamW, equals_torch) {
  // torch.optim.AdamW(lr=5e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01) on the parameter
  // [1.0, -0.5, 0.25, 0.0] with gradients g(step, i) = (i - 1.5) * 0.1 * (step + 1), float32,
  // torch 2.11.0, after steps 1, 2 and 3.
  const double torch[3][4] = {{1.004950047, -0.4949750006, 0.2449875027, -0.004999999888},
                              {1.009689689, -0.4901603162, 0.2401853204, -0.009789679199},
                              {1.014361739, -0.4854132831, 0.2354507595, -0.0145117389}};
  Adapter adapter = small_adapter({"q_proj"});
  const float start[] = {1.0F, -0.5F, 0.25F, 0.0F};
  std::copy(start, start + 4, adapter.factors().begin());
  AdamWOptions options;
  options.weight_decay = 0.01;
  AdamW adamw(adapter, options);
  std::vector<float> gradients(adapter.factors().size());
  for (int step = 0; step < 3; ++step) {
    for (int i = 0; i < 4; ++i) {
      gradients[static_cast<std::size_t>(i)] =
          (static_cast<float>(i) - 1.5F) * 0.1F * static_cast<float>(step + 1);
    }
    adamw.step(adapter.factors(), gradients, 5e-3, 1.0);
    for (int i = 0; i < 4; ++i) {
      EXPECT_NEAR(adapter.factors()[static_cast<std::size_t>(i)], torch[step][i], 4 * 0x1p-24)
          << "step " << step << ", element " << i;
    }
  }
  EXPECT_EQ(adamw.steps(), 3);
}

TEST(AdamW, equals_the_formula_in_double) {
  for (const double ratio : {1.0, 16.0}) {
    Adapter adapter = small_adapter({"attention", "dense_mlp"});
    AdamWOptions options{0.9, 0.999, 1e-8, 0.1, ratio};
    AdamW adamw(adapter, options);
    const std::size_t n = adapter.factors().size();
    std::vector<double> w(n), m(n), v(n), rate_ratio(n, 1.0);
    for (std::size_t i = 0; i < n; ++i) w[i] = adapter.factors()[i] = random_number(1, i);
    for (const LoraSite& site : adapter.sites()) {  // LoRA+: B learns faster
      for (std::int64_t i = 0; i < site.b_size(); ++i) {
        rate_ratio[static_cast<std::size_t>(site.b_offset + i)] = ratio;
      }
    }
    std::vector<float> gradients(n);
    for (int step = 1; step <= 12; ++step) {
      for (std::size_t i = 0; i < n; ++i) {
        gradients[i] = random_number(static_cast<std::uint64_t>(step) + 1, i);
      }
      const double rate = 1e-3 * step, factor = step % 2 == 0 ? 0.25 : 1.0;
      adamw.step(adapter.factors(), gradients, rate, factor);
      for (std::size_t i = 0; i < n; ++i) {
        const double g = gradients[i] * factor, own = rate * rate_ratio[i];
        m[i] = options.beta1 * m[i] + (1 - options.beta1) * g;
        v[i] = options.beta2 * v[i] + (1 - options.beta2) * g * g;
        const double m_hat = m[i] / (1 - std::pow(options.beta1, step));
        const double v_hat = v[i] / (1 - std::pow(options.beta2, step));
        w[i] = w[i] * (1 - own * options.weight_decay) -
               own * m_hat / (std::sqrt(v_hat) + options.epsilon);
      }
    }
    // 12 steps, a handful of float32 roundings each, of numbers up to 1 + the path walked.
    double walked = 1;
    for (int step = 1; step <= 12; ++step) walked += 1e-3 * step * ratio;
    for (std::size_t i = 0; i < n; ++i) {
      ASSERT_NEAR(adapter.factors()[i], w[i], 12 * 8 * 0x1p-24 * walked) << i;
      ASSERT_NEAR(adamw.first_moment()[i], m[i], 12 * 4 * 0x1p-24) << i;
      ASSERT_NEAR(adamw.second_moment()[i], v[i], 12 * 4 * 0x1p-24) << i;
    }
  }
}

TEST(AdamW, does_not_depend_on_threads_and_goes_on_from_its_moments) {
  const int threads = at::get_num_threads();
  std::vector<std::vector<float>> results;
  for (const int count : {1, 3}) {
    at::set_num_threads(count);
    Adapter adapter = small_adapter({"all"});
    AdamW adamw(adapter, {});
    std::vector<float> gradients(adapter.factors().size());
    for (std::uint64_t step = 0; step < 4; ++step) {
      for (std::size_t i = 0; i < gradients.size(); ++i) gradients[i] = random_number(step, i);
      if (step == 2 && count == 3) {  // as a resumed run does
        AdamW later(adapter, {});
        std::copy(adamw.first_moment().begin(), adamw.first_moment().end(),
                  later.first_moment().begin());
        std::copy(adamw.second_moment().begin(), adamw.second_moment().end(),
                  later.second_moment().begin());
        later.set_steps(adamw.steps());
        adamw = later;
      }
      adamw.step(adapter.factors(), gradients, 1e-3, 1.0);
    }
    results.emplace_back(adapter.factors().begin(), adapter.factors().end());
  }
  at::set_num_threads(threads);
  EXPECT_EQ(results[0], results[1]);
}

TEST(GradientNorm, is_the_same_read_window_by_window_from_a_file) {
  for (const std::int64_t n : {std::int64_t{5}, std::int64_t{70'000}, std::int64_t{9'000'001}}) {
    const Arena arena = Arena::in_file(n * 4, testing::TempDir());
    const auto values = arena.as<float>();
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = random_number(9, i);
    const double want = gradient_norm(values);
    EXPECT_GT(want, 0);
    EXPECT_EQ(gradient_norm(values, &arena), want);
    EXPECT_EQ(gradient_norm(values, &arena), want);
  }
}

TEST(GradientNorm, is_the_root_of_the_sum_of_squares) {
  EXPECT_EQ(gradient_norm({}), 0);
  const std::vector<float> pair = {3.0F, -4.0F};
  EXPECT_EQ(gradient_norm(pair), 5);
  // Squares of these overflow float32.
  const std::vector<float> large(4, 1e30F);
  EXPECT_NEAR(gradient_norm(large) / 2e30, 1, 1e-7);
  std::vector<float> many((1U << 17U) + 12345);
  double sum = 0;
  for (std::size_t i = 0; i < many.size(); ++i) {
    many[i] = random_number(9, i);
    sum += static_cast<double>(many[i]) * static_cast<double>(many[i]);
  }
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const double one = gradient_norm(many);
  at::set_num_threads(3);
  EXPECT_EQ(gradient_norm(many), one);
  at::set_num_threads(threads);
  EXPECT_NEAR(one, std::sqrt(sum), 1e-12 * std::sqrt(sum));
  many[70'000] = NAN;
  EXPECT_TRUE(std::isnan(gradient_norm(many)));
}

TEST(ClipFactor, is_torchs) {
  EXPECT_EQ(clip_factor(0.5, 1), 1);
  EXPECT_EQ(clip_factor(0, 1), 1);
  EXPECT_DOUBLE_EQ(clip_factor(4, 1), 1 / (4 + 1e-6));
  EXPECT_DOUBLE_EQ(clip_factor(4, 0.3), 0.3 / (4 + 1e-6));
  EXPECT_EQ(clip_factor(1e9, 0), 1) << "0 turns clipping off";
}

TEST(Schedule, values) {
  Schedule schedule{ScheduleKind::constant, 2e-4, 4, 12};
  EXPECT_DOUBLE_EQ(schedule.at(0), 0.5e-4);
  EXPECT_DOUBLE_EQ(schedule.at(1), 1.0e-4);
  EXPECT_DOUBLE_EQ(schedule.at(3), 2e-4);
  EXPECT_DOUBLE_EQ(schedule.at(4), 2e-4);
  EXPECT_DOUBLE_EQ(schedule.at(11), 2e-4);

  schedule.kind = ScheduleKind::linear;  // 8 steps are left after the warm-up
  EXPECT_DOUBLE_EQ(schedule.at(3), 2e-4);
  EXPECT_DOUBLE_EQ(schedule.at(4), 2e-4);
  EXPECT_DOUBLE_EQ(schedule.at(6), 1.5e-4);
  EXPECT_DOUBLE_EQ(schedule.at(11), 0.25e-4);
  EXPECT_DOUBLE_EQ(schedule.at(12), 0);
  EXPECT_DOUBLE_EQ(schedule.at(100), 0);

  schedule.kind = ScheduleKind::cosine;
  EXPECT_DOUBLE_EQ(schedule.at(2), 1.5e-4);
  EXPECT_DOUBLE_EQ(schedule.at(4), 2e-4);
  EXPECT_DOUBLE_EQ(schedule.at(6), 1e-4 * (1 + std::sqrt(0.5)));
  EXPECT_DOUBLE_EQ(schedule.at(8), 1e-4);
  EXPECT_NEAR(schedule.at(12), 0, 1e-20);

  const Schedule no_warmup{ScheduleKind::cosine, 1, 0, 2};
  EXPECT_DOUBLE_EQ(no_warmup.at(0), 1);
  EXPECT_DOUBLE_EQ(no_warmup.at(1), 0.5);
  const Schedule only_warmup{ScheduleKind::linear, 1, 5, 5};
  EXPECT_DOUBLE_EQ(only_warmup.at(4), 1);
}

}  // namespace
}  // namespace tailor
