// Paged state of routed experts, and layer inputs on disk, against the same in memory: every bit.

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#include "tests/support/fixture.h"
#include "tests/support/process_memory.h"
#include "tests/support/training_run.h"
#include "trainer/run_state.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

using namespace testing_support;

const RandomSource::Shape kDocuments = {{13, 9, 5, 18, 7}, {13, 5, 7}, 4, 3};

struct Course {
  at::ScalarType dtype = at::kFloat;
  bool defer = false;            ///< the experts' update, whatever their home
  bool experts_on_disk = false;  ///< and deferred
  bool inputs_on_disk = false;
  Activations keep = Activations::recomputed;
  std::int64_t expert_rank = 3;
  int steps = 7;
  int evaluate_after = -1, resume_after = -1;
};

class Paged : public testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);  // the passes are tiny: a team of threads would only wait for itself
    folder_ = fs::path(testing::TempDir()) / ("paged_" + std::to_string(::getpid()));
    fs::create_directories(folder_ / "scratch");
  }
  void TearDown() override {
    at::set_num_threads(threads_);
    fs::remove_all(folder_);
  }

  ArenaHome home(bool on_disk) const {
    return on_disk ? ArenaHome{folder_ / "scratch"} : ArenaHome{};
  }

  /// All that a run is made of; members in the order they need each other.
  struct Attempt {
    Attempt(const Course& course, const ArenaHome& experts, const ArenaHome& inputs)
        : model(load_tiny(golden("llama4_maverick_tiny") / "model", course.dtype)),
          source(model.spec.vocab, kDocuments),
          adapter(Adapter::create(model.spec, lora(course), 7, experts)),
          optimizer(adapter, adamw(), experts) {
      TrainerOptions options;
      options.schedule = {ScheduleKind::linear, 2e-3, 2, course.steps};
      options.adamw = adamw();
      options.max_grad_norm = kMaxNorm;
      options.dropout = 0.1;
      options.seed = 5;
      options.keep = course.keep;
      if (course.defer || course.experts_on_disk) options.paged_experts = experts;
      model.decoder->keep_in(inputs);
      trainer = std::make_unique<Trainer>(*model.decoder, adapter, optimizer, source, options);
    }
    static LoraOptions lora(const Course& course) {
      LoraOptions options;
      options.rank = 4;
      options.expert_rank = course.expert_rank;
      options.targets = {"all"};
      return options;
    }
    static AdamWOptions adamw() { return {0.9, 0.95, 1e-8, 0.1, 4}; }

    static constexpr double kMaxNorm = 1e-3;
    TinyModel model;
    RandomSource source;
    Adapter adapter;
    AdamW optimizer;
    std::unique_ptr<Trainer> trainer;
  };

  std::unique_ptr<Attempt> attempt(const Course& course) const {
    return std::make_unique<Attempt>(course, home(course.experts_on_disk),
                                     home(course.inputs_on_disk));
  }

  Trajectory run(const Course& course) const {
    return run_steps(
        [&] { return attempt(course); }, course.steps, course.resume_after, folder_ / "checkpoints",
        [&](Attempt& now, int s, const StepRecord& record, Trajectory& out) {
          EXPECT_GT(record.grad_norm, Attempt::kMaxNorm) << "clipping must be active in every step";
          if (s != course.evaluate_after) return;
          now.model.decoder->set_adapter(&now.adapter);
          const Batch batch = now.source.batch_at(1000, 0, 1);
          out.eval_losses = now.model.decoder->evaluate(token_input(batch)).losses;
          EXPECT_EQ(now.optimizer.pending(), 0);
        });
  }

  const int threads_ = at::get_num_threads();
  fs::path folder_;
};

void expect_same(const Trajectory& got, const Trajectory& want) {
  EXPECT_EQ(got.losses, want.losses);
  EXPECT_EQ(got.norms, want.norms);
  EXPECT_EQ(got.eval_losses, want.eval_losses);
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  };
  EXPECT_TRUE(same(got.factors, want.factors));
  EXPECT_TRUE(same(got.first, want.first));
  EXPECT_TRUE(same(got.second, want.second));
}

TEST_F(Paged, a_trajectory_is_that_of_resident_experts_to_the_bit) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const Activations keep : {Activations::recomputed, Activations::kept}) {
      Course course;
      course.dtype = dtype;
      course.keep = keep;
      course.evaluate_after = 3;
      const Trajectory resident = run(course);
      EXPECT_FALSE(resident.eval_losses.empty());
      course.defer = true;
      expect_same(run(course), resident);
      course.experts_on_disk = true;
      expect_same(run(course), resident);
      course.inputs_on_disk = true;
      expect_same(run(course), resident);
      course.defer = course.experts_on_disk = false;
      expect_same(run(course), resident);
    }
  }
}

TEST_F(Paged, an_evaluation_or_a_resume_changes_nothing) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Course course;
    course.dtype = dtype;
    const Trajectory unbroken = run(course);
    course.experts_on_disk = true;
    course.resume_after = 2;
    expect_same(run(course), unbroken);
    course.resume_after = 4;
    course.evaluate_after = 3;
    Trajectory evaluated = run(course);
    EXPECT_FALSE(evaluated.eval_losses.empty());
    evaluated.eval_losses.clear();
    expect_same(evaluated, unbroken);
    // What one kind of attempt saved, the other goes on from.
    course.experts_on_disk = false;
    course.evaluate_after = -1;
    expect_same(run(course), unbroken);
  }
}

TEST_F(Paged, layers_larger_than_a_window_give_the_same_bits_and_leave_memory) {
  Course course;
  course.expert_rank = 700;  // 1.5 M factors a layer
  course.steps = 3;
  const Trajectory resident = run(course);
  course.experts_on_disk = true;
  expect_same(run(course), resident);

  const std::unique_ptr<Attempt> now = attempt(course);
  now->trainer->step(0);
  now->trainer->flush();
  const FactorRange last = now->adapter.experts_of(3);
  ASSERT_GT(last.size(), 1'500'000);
  const std::int64_t size = now->adapter.arena().size();
  EXPECT_GT(2 * last.size() * 4, size * 9 / 10);
  for (const std::byte* arena : {now->adapter.arena().data(), now->optimizer.first_arena().data(),
                                 now->optimizer.second_arena().data()}) {
    EXPECT_LE(resident_bytes_at(arena), size / 10);
    EXPECT_GE(resident_bytes_at(arena), 0);
  }
}

TEST_F(Paged, the_update_of_experts_waits_for_the_next_pass) {
  Course course;
  course.defer = true;
  const std::unique_ptr<Attempt> now = attempt(course);
  now->trainer->step(0);
  now->trainer->flush();
  const auto factors = now->adapter.factors();
  const std::vector<float> before(factors.begin(), factors.end());
  now->trainer->step(1);
  // The thread may go one layer ahead of a pass: the first with experts, and no further.
  const FactorRange first = now->adapter.experts_of(1), last = now->adapter.experts_of(3);
  for (int i = 0; i < 1000 && now->optimizer.pending() > last.size(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(now->optimizer.pending(), last.size());
  const auto changed = [&](std::int64_t begin, std::int64_t end) {
    return !std::equal(before.begin() + begin, before.begin() + end, factors.begin() + begin);
  };
  EXPECT_TRUE(changed(0, first.begin));
  EXPECT_TRUE(changed(first.begin, first.end));
  EXPECT_TRUE(changed(first.end, last.begin));
  EXPECT_FALSE(changed(last.begin, last.end));

  // Nobody saves a state that belongs to no step.
  const auto save = [&] {
    return save_checkpoint(folder_ / "checkpoints", 2, now->adapter, now->optimizer, {}, 1);
  };
  try {
    save();
    FAIL() << "saved factors of two steps";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::internal);
  }
  EXPECT_FALSE(fs::exists(folder_ / "checkpoints"));
  now->trainer->flush();
  EXPECT_TRUE(changed(last.begin, last.end));
  EXPECT_EQ(now->optimizer.pending(), 0);
  EXPECT_EQ(save().step, 2);

  // The next pass takes what is left, and so does the trainer's end.
  now->trainer->step(2);
  now->trainer->step(3);
  EXPECT_GT(now->optimizer.pending(), 0);
  now->trainer.reset();
  EXPECT_EQ(now->optimizer.pending(), 0);
}

TEST_F(Paged, a_step_that_is_begun_twice_or_updated_twice_is_a_mistake) {
  const std::unique_ptr<Attempt> now = attempt({});
  const std::vector<float> gradients(now->adapter.factors().size(), 1.0F);
  now->optimizer.begin_step(1e-3, 1);
  EXPECT_THROW(now->optimizer.begin_step(1e-3, 1), Error);
  const auto all = static_cast<std::int64_t>(gradients.size());
  now->optimizer.finish(now->adapter.factors(), gradients, {0, all}, false);
  EXPECT_EQ(now->optimizer.pending(), 0);
  EXPECT_THROW(now->optimizer.finish(now->adapter.factors(), gradients, {0, 1}, false), Error);
}

/// Writes down what it is told.
class RecordingPager final : public FactorPager {
 public:
  void before_layer(int layer, Way way) override {
    said.push_back((way == Way::forward ? "forward " : "backward ") + std::to_string(layer));
    if (fail_at == said.back()) throw Error(Fault::io, {"a page is lost", "", ""});
  }
  void after_layer(int layer, Way way) noexcept override {
    said.push_back((way == Way::forward ? "done forward " : "done backward ") +
                   std::to_string(layer));
  }
  void first_cast(const Adapter& adapter) override { cast->cast_all(adapter); }
  void flush() override { said.emplace_back("flush"); }

  CastFactors* cast = nullptr;
  std::vector<std::string> said;
  std::string fail_at;
};

TEST_F(Paged, the_decoder_tells_its_way_through_the_layers) {
  TinyModel model = load_tiny(golden("llama4_maverick_tiny") / "model", at::kFloat);
  const RandomSource source(model.spec.vocab, kDocuments);
  const Batch batch = source.batch_at(0, 0, 1);
  const Adapter adapter = Adapter::create(model.spec, Attempt::lora({}), 1);
  RecordingPager pager;
  pager.cast = &model.decoder->cast_factors();
  model.decoder->set_pager(&pager, {});
  EXPECT_EQ(model.decoder->adapter(), nullptr);
  model.decoder->set_adapter(&adapter);
  EXPECT_EQ(pager.said, std::vector<std::string>{"flush"});
  std::vector<std::string> up, down;
  for (int l = 0; l < 4; ++l) {
    up.push_back("forward " + std::to_string(l));
    up.push_back("done " + up.back());
    down.push_back("backward " + std::to_string(3 - l));
    down.push_back("done " + down.back());
  }
  pager.said.clear();
  model.decoder->evaluate(token_input(batch));
  EXPECT_EQ(pager.said, up);
  pager.said.clear();
  const at::Tensor gradients = at::zeros({adapter.parameter_count()});
  for (const Activations keep : {Activations::recomputed, Activations::kept}) {
    TrainPass pass;
    pass.keep = keep;
    pager.said.clear();
    model.decoder->forward_backward(token_input(batch), pass, gradients);
    std::vector<std::string> both = up;
    both.insert(both.end(), down.begin(), down.end());
    EXPECT_EQ(pager.said, both);
  }
  // What stops a page surfaces in the pass, and the next pass works.
  for (const char* at : {"forward 2", "backward 1"}) {
    pager.fail_at = at;
    EXPECT_THROW(model.decoder->forward_backward(token_input(batch), {}, gradients), Error);
  }
  pager.fail_at.clear();
  model.decoder->forward_backward(token_input(batch), {}, gradients);
  model.decoder->set_pager(nullptr, {});
  pager.said.clear();
  model.decoder->set_adapter(&adapter);
  model.decoder->evaluate(token_input(batch));
  EXPECT_TRUE(pager.said.empty());
}

TEST_F(Paged, a_diverged_step_leaves_factors_and_moments_as_they_were) {
  Course course;
  course.experts_on_disk = true;
  const std::unique_ptr<Attempt> now = attempt(course);
  now->trainer->step(0);
  now->trainer->flush();
  const LoraSite& down = *now->adapter.find(3, Projection::experts_down);
  for (float& value : now->adapter.a_of(down)) value = std::numeric_limits<float>::quiet_NaN();
  now->model.decoder->cast_factors().cast_all(now->adapter);
  const std::vector<float> first(now->optimizer.first_moment().begin(),
                                 now->optimizer.first_moment().end());
  try {
    now->trainer->step(1);
    FAIL() << "went on with NaN";
  } catch (const Error& error) {
    EXPECT_NE(error.parts().what.find("diverged"), std::string::npos);
  }
  EXPECT_EQ(now->optimizer.pending(), 0);
  EXPECT_EQ(now->optimizer.steps(), 1);
  EXPECT_TRUE(std::equal(first.begin(), first.end(), now->optimizer.first_moment().begin()));
}

TEST_F(Paged, no_file_is_seen_in_the_scratch_folder) {
  Course course;
  course.experts_on_disk = course.inputs_on_disk = true;
  const std::unique_ptr<Attempt> now = attempt(course);
  now->trainer->step(0);
  EXPECT_TRUE(fs::is_empty(folder_ / "scratch"));
}

/// The most memory that a pass over 16,384 tokens, and what it needs, takes in a process of its
/// own.
void pass_in_memory_of_its_own(const ArenaHome& home, const fs::path& report) {
  at::set_num_threads(1);
  TinyModel model = load_tiny(golden("llama4_maverick_tiny") / "model", at::kFloat);
  model.decoder->keep_in(home);
  Tokens tokens;
  for (int d = 0; d < 512; ++d) {
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 32; ++i) ids.push_back((d * 7 + i * 3) % 256);
    tokens.add_document(ids, {ids.begin(), ids.end()});
    if (d % 4 == 3) tokens.end_micro_batch();
  }
  const Adapter adapter = Adapter::create(model.spec, {4, 8, 0, false, 2, 4, {"all"}}, 1);
  model.decoder->set_adapter(&adapter);
  const at::Tensor gradients = at::zeros({adapter.parameter_count()});
  TrainPass pass;
  pass.keep = Activations::kept;
  double sum = 0;
  for (int i = 0; i < 2; ++i) {
    sum = model.decoder->forward_backward(tokens.input(), pass, gradients).loss_sum;
  }
  std::ofstream(report) << resident_bytes_peak() << " " << model.decoder->pass_bytes_peak() << " "
                        << std::hexfloat << sum << " " << gradients.norm().item<double>();
}

TEST(LayerInputs, on_disk_leave_memory) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a process of its own for each
  const fs::path folder = fs::path(testing::TempDir()) / "layer_inputs_on_disk";
  fs::create_directories(folder);
  const auto measure = [&](const char* name, const ArenaHome& home) {
    const fs::path report = folder / name;
    EXPECT_EXIT(
        {
          pass_in_memory_of_its_own(home, report);
          std::_Exit(0);
        },
        testing::ExitedWithCode(0), testing::_);
    return read_text(report);
  };
  std::istringstream memory(measure("memory", {})), disk(measure("disk", {folder}));
  std::int64_t memory_peak = 0, disk_peak = 0, memory_taken = 0, disk_taken = 0;
  std::string memory_result, disk_result;
  memory >> memory_peak >> memory_taken;
  std::getline(memory, memory_result);
  disk >> disk_peak >> disk_taken;
  std::getline(disk, disk_result);
  fs::remove_all(folder);
  EXPECT_EQ(memory_result, disk_result);
  EXPECT_FALSE(memory_result.empty());
  EXPECT_EQ(memory_taken, disk_taken);
  RecordProperty("memory_peak", std::to_string(memory_peak));
  RecordProperty("disk_peak", std::to_string(disk_peak));
  // Four layers of about equal size, of which two or three may be in memory at the turn.
  EXPECT_LT(disk_peak, memory_peak - memory_taken / 4);
}

}  // namespace
}  // namespace tailor
