// Scans count what the router did, and training with chosen experts is training of all with the
// others' factors left at zero, without paying for those.

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "data/store/pack.h"
#include "data/store/store.h"
#include "tests/support/fixture.h"
#include "tests/support/training_run.h"
#include "trainer/routing_counts.h"
#include "trainer/run_state.h"
#include "trainer/stream/store_weights.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

using namespace testing_support;

const RandomSource::Shape kDocuments = {{19, 8, 24, 11}, {19, 24}, 3, 11};

fs::path model_folder() { return golden("llama4_maverick_tiny") / "model"; }

/// The golden Maverick with another number of experts a token.
TinyModel model_with_top_k(std::int64_t top_k, at::ScalarType dtype) {
  ModelSpec spec = read_model_spec(model_folder());
  spec.experts_per_token = top_k;
  const Checkpoint checkpoint = Checkpoint::open(model_folder());
  return {spec,
          Decoder::create(resident_weights(spec, load_weights(checkpoint, spec, dtype)), dtype)};
}

/// Counts of steps 0 and 1, by hand from traces.
ExpertLoad counts_by_hand(TinyModel& model, const RandomSource& source, CountedTokens counted) {
  ExpertLoad want = empty_load(model.spec);
  const auto K = static_cast<std::size_t>(model.spec.experts_per_token);
  for (int s = 0; s < 2; ++s) {
    const Batch batch = source.batch_at(s, 0, 1);
    const Trace trace = model.decoder->trace(token_input(batch));
    for (std::size_t t = 0; t < batch.ids.size(); ++t) {
      if (counted == CountedTokens::trained && batch.target[t] < 0) continue;
      ++want.tokens;
      for (LayerLoad& layer : want.layers) {
        const auto l = static_cast<std::size_t>(layer.layer);
        for (std::size_t k = 0; k < K; ++k) {
          const auto e = static_cast<std::size_t>(trace.expert[l][t * K + k]);
          ++layer.tokens[e];
          layer.gate[e] += trace.gate[l][t * K + k];
        }
      }
    }
  }
  return want;
}

ExpertLoad scan(Decoder& decoder, const RandomSource& source, CountedTokens counted) {
  ExpertLoad load = empty_load(decoder.spec());
  for (int s = 0; s < 2; ++s) {
    count_routing(decoder, source.batch_at(s, 0, 1), counted, s == 0, load);
  }
  return load;
}

void expect_same(const ExpertLoad& got, const ExpertLoad& want) {
  EXPECT_EQ(got.tokens, want.tokens);
  EXPECT_EQ(got.experts_per_token, want.experts_per_token);
  ASSERT_EQ(got.layers.size(), want.layers.size());
  for (std::size_t l = 0; l < want.layers.size(); ++l) {
    EXPECT_EQ(got.layers[l].layer, want.layers[l].layer);
    EXPECT_EQ(got.layers[l].tokens, want.layers[l].tokens);
    EXPECT_EQ(got.layers[l].gate, want.layers[l].gate);
  }
}

TEST(Scan, counts_are_those_of_a_trace_by_hand) {
  for (const std::int64_t top_k : {1, 3}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      TinyModel model = model_with_top_k(top_k, dtype);
      const RandomSource source(model.spec.vocab, kDocuments);
      for (const CountedTokens counted : {CountedTokens::all, CountedTokens::trained}) {
        const ExpertLoad want = counts_by_hand(model, source, counted);
        ASSERT_EQ(want.layers.size(), 2U);
        EXPECT_EQ(want.tokens, counted == CountedTokens::all ? 124 : 80);
        std::int64_t choices = 0;
        for (const std::int64_t tokens : want.layers[0].tokens) choices += tokens;
        EXPECT_EQ(choices, want.tokens * top_k);
        expect_same(scan(*model.decoder, source, counted), want);
      }
    }
  }
}

TEST(Scan, counts_what_deepseeks_groups_choose) {
  TinyModel model = load_tiny(golden("deepseek_v3_tiny") / "model", at::kFloat);
  const RandomSource source(model.spec.vocab, kDocuments);
  const ExpertLoad want = counts_by_hand(model, source, CountedTokens::all);
  ASSERT_EQ(want.layers.size(), 2U);
  expect_same(scan(*model.decoder, source, CountedTokens::all), want);
}

TEST(Training, counts_the_rows_of_each_expert_where_asked) {
  TinyModel model = model_with_top_k(3, at::kFloat);
  const RandomSource source(model.spec.vocab, kDocuments);
  LoraOptions lora;
  lora.targets = {"attention"};
  Adapter adapter = Adapter::create(model.spec, lora, 7);
  AdamW optimizer(adapter, {});
  TrainerOptions options;
  options.schedule = {ScheduleKind::constant, 1e-3, 0, 3};
  options.count_experts_every = 2;
  Trainer trainer(*model.decoder, adapter, optimizer, source, options);
  for (int s = 0; s < 3; ++s) {
    ExpertLoad load = empty_load(model.spec);
    model.decoder->set_adapter(&adapter);
    count_routing(*model.decoder, source.batch_at(s, 0, 1), CountedTokens::all, false, load);
    std::vector<std::int64_t> want;
    for (const LayerLoad& layer : load.layers) {
      want.insert(want.end(), layer.tokens.begin(), layer.tokens.end());
    }
    if (s == 1) want.clear();
    EXPECT_EQ(trainer.step(s).expert_rows, want) << s;
  }
}

TEST(Scan, of_a_store_on_disk_counts_what_one_in_memory_counts) {
  const fs::path folder =
      fs::path(testing::TempDir()) / ("scan_store_" + std::to_string(::getpid()));
  fs::remove_all(folder);
  PackOptions options;
  options.formats = {{false, WeightKind::int4, 0}, {}};
  pack_store(model_folder(), folder, options);
  const auto store = std::make_shared<const Store>(Store::open(folder));
  const RandomSource source(store->spec().vocab, kDocuments);
  const auto counts = [&](const StreamOptions& homes, bool streams) {
    const auto decoder =
        Decoder::create(StoreWeights::open(store, at::kBFloat16, homes), at::kBFloat16);
    const ExpertLoad load = scan(*decoder, source, CountedTokens::all);
    // Two passes over the layers, and the vocabulary head is never read.
    std::int64_t layers = 0;
    for (const StoredUnit& unit : store->layout().units) {
      const UnitKind kind = unit.id.kind;
      const bool of_layer =
          kind == UnitKind::attention || kind == UnitKind::feed_forward || kind == UnitKind::expert;
      if (of_layer) layers += unit.bytes;
    }
    const RingCounters counters = decoder->weights().counters();
    EXPECT_EQ(counters.streamed_bytes - counters.row_bytes, streams ? 2 * layers : 0);
    return load;
  };
  StreamOptions all_on_disk;
  all_on_disk.device_bytes = 0;
  all_on_disk.host_bytes = 0;
  expect_same(counts(all_on_disk, true), counts({}, false));
  fs::remove_all(folder);
}

// ---------------------------------------------------------------- training

using Chosen = std::map<int, std::vector<std::int32_t>>;
/// Layers 1 and 3 have 8 experts each.
const Chosen kSome = {{1, {0, 2, 3, 7}}, {3, {5}}};
const Chosen kOneLayer = {{1, {}}, {3, {1, 6}}};
const Chosen kAll = {{1, {0, 1, 2, 3, 4, 5, 6, 7}}, {3, {0, 1, 2, 3, 4, 5, 6, 7}}};

struct Course {
  std::string model = "llama4_maverick_tiny";
  ChosenByLayer chosen = kSome;
  at::ScalarType dtype = at::kFloat;
  Activations keep = Activations::recomputed;
  bool on_disk = false;
  double max_norm = 1e-3;
  Chosen zero_but;  ///< with all experts: those outside of these start with both factors zero
  int steps = 5;
  int resume_after = -1;
};

LoraOptions lora(const ChosenByLayer& chosen) {
  LoraOptions options;
  options.rank = 4;
  options.expert_rank = 3;
  options.targets = {"all"};
  options.chosen_experts = chosen;
  return options;
}

class ChosenExpertsTraining : public testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    folder_ = fs::path(testing::TempDir()) / ("chosen_" + std::to_string(::getpid()));
    fs::create_directories(folder_ / "scratch");
  }
  void TearDown() override {
    at::set_num_threads(threads_);
    fs::remove_all(folder_);
  }

  struct Attempt {
    Attempt(const Course& course, const ArenaHome& home)
        : model(load_tiny(golden(course.model) / "model", course.dtype)),
          source(model.spec.vocab, kDocuments),
          adapter(Adapter::create(model.spec, lora(course.chosen), 7, home)),
          optimizer(adapter, {0.9, 0.95, 1e-8, 0.1, 4}, home) {
      if (!course.zero_but.empty()) zero_others(adapter, course.zero_but);
      TrainerOptions options;
      options.schedule = {ScheduleKind::linear, 2e-3, 2, course.steps};
      options.adamw = {0.9, 0.95, 1e-8, 0.1, 4};
      options.max_grad_norm = course.max_norm;
      options.dropout = 0.1;
      options.seed = 5;
      options.keep = course.keep;
      if (course.on_disk) options.paged_experts = home;
      trainer = std::make_unique<Trainer>(*model.decoder, adapter, optimizer, source, options);
    }
    static void zero_others(Adapter& adapter, const Chosen& but) {
      for (const LoraSite& site : adapter.sites()) {
        if (!site.is_experts()) continue;
        for (std::int32_t e = 0; e < site.experts; ++e) {
          const auto& chosen = but.at(site.layer);
          if (std::find(chosen.begin(), chosen.end(), e) != chosen.end()) continue;
          const auto a =
              adapter.a_of(site).subspan(static_cast<std::size_t>(e * site.rank * site.in));
          std::fill_n(a.begin(), site.rank * site.in, 0.0F);
        }
      }
    }
    TinyModel model;
    RandomSource source;
    Adapter adapter;
    AdamW optimizer;
    std::unique_ptr<Trainer> trainer;
  };

  std::unique_ptr<Attempt> attempt(const Course& course) const {
    return std::make_unique<Attempt>(course,
                                     course.on_disk ? ArenaHome{folder_ / "scratch"} : ArenaHome{});
  }

  Trajectory run(const Course& course) const {
    return run_steps([&] { return attempt(course); }, course.steps, course.resume_after,
                     folder_ / "checkpoints", [](auto&&...) {});
  }

  const int threads_ = at::get_num_threads();
  fs::path folder_;
};

/// An expert's factors out of a flat arena.
std::vector<float> of_expert(std::span<const float> arena, const LoraSite& site, std::int64_t e) {
  std::vector<float> out;
  const auto take = [&](std::int64_t offset, std::int64_t each) {
    const auto part = arena.subspan(static_cast<std::size_t>(offset + site.slot(e) * each),
                                    static_cast<std::size_t>(each));
    out.insert(out.end(), part.begin(), part.end());
  };
  take(site.a_offset, site.rank * site.in);
  take(site.b_offset, site.rank * site.out);
  return out;
}

TEST_F(ChosenExpertsTraining, all_of_them_is_all_to_the_bit) {
  Course course;
  course.chosen = kAll;
  const Trajectory chosen = run(course);
  course.chosen.reset();
  EXPECT_EQ(chosen, run(course));
}

TEST_F(ChosenExpertsTraining, nothing_is_held_for_the_others) {
  Course course;
  const std::unique_ptr<Attempt> some = attempt(course);
  course.chosen.reset();
  const std::unique_ptr<Attempt> all = attempt(course);
  const ModelSpec& spec = some->model.spec;
  const std::int64_t each = 3 * (2 * spec.hidden + 3 * spec.expert_width);
  EXPECT_EQ(all->adapter.parameter_count() - some->adapter.parameter_count(), (16 - 5) * each);
  EXPECT_EQ(some->adapter.experts_of(1).size(), 4 * each);
  EXPECT_EQ(some->adapter.experts_of(3).size(), each);
  for (const Arena* arena :
       {&some->adapter.arena(), &some->optimizer.first_arena(), &some->optimizer.second_arena()}) {
    EXPECT_EQ(arena->size(), some->adapter.parameter_count() * 4);
  }
  // A chosen expert starts as it does among all.
  const LoraSite* site = some->adapter.find(3, Projection::experts_down);
  const LoraSite* whole = all->adapter.find(3, Projection::experts_down);
  EXPECT_EQ(of_expert(some->adapter.factors(), *site, 5),
            of_expert(all->adapter.factors(), *whole, 5));
}

// With both factors zero an expert gets no gradient, so training all of them then is the same
// computation; without clipping, whose norm is summed in blocks, it is the same to the bit.
TEST_F(ChosenExpertsTraining, is_training_of_all_with_the_others_at_zero) {
  // DeepSeek's mixtures are layers 1 and 2.
  const std::pair<std::string, Chosen> models[] = {
      {"llama4_maverick_tiny", kSome}, {"deepseek_v3_tiny", {{1, {0, 2, 3, 7}}, {2, {5}}}}};
  for (const auto& [name, some_experts] : models) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      for (const Activations keep : {Activations::recomputed, Activations::kept}) {
        Course course;
        course.model = name;
        course.chosen = some_experts;
        course.dtype = dtype;
        course.keep = keep;
        course.max_norm = 0;
        const Trajectory some = run(course);
        const Adapter layout = attempt(course)->adapter;
        course.chosen.reset();
        course.zero_but = some_experts;
        const Trajectory all = run(course);
        const Adapter whole = attempt(course)->adapter;
        EXPECT_EQ(some.losses, all.losses);
        int moved = 0;
        for (const LoraSite& site : layout.sites()) {
          const LoraSite* other = whole.find(site.layer, site.projection);
          ASSERT_NE(other, nullptr);
          for (const std::int32_t e : site.chosen()) {
            EXPECT_EQ(of_expert(some.factors, site, e), of_expert(all.factors, *other, e))
                << site.module << " expert " << e;
            EXPECT_EQ(of_expert(some.second, site, e), of_expert(all.second, *other, e));
            const auto start = of_expert(layout.factors(), site, e);
            moved += site.is_experts() && of_expert(some.factors, site, e) != start ? 1 : 0;
          }
        }
        EXPECT_GE(moved, 2) << "chosen experts that tokens went to have learnt";
      }
    }
  }
}

TEST_F(ChosenExpertsTraining, paged_resumed_or_recomputed_gives_the_same_bits) {
  for (const Chosen& chosen : {kSome, kOneLayer}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      Course course;
      course.chosen = chosen;
      course.dtype = dtype;
      const Trajectory resident = run(course);
      course.keep = Activations::kept;
      EXPECT_EQ(run(course), resident);
      course.on_disk = true;
      EXPECT_EQ(run(course), resident);
      course.keep = Activations::recomputed;
      course.resume_after = 2;
      EXPECT_EQ(run(course), resident);
      course.on_disk = false;
      EXPECT_EQ(run(course), resident);
    }
  }
}

TEST_F(ChosenExpertsTraining, a_checkpoint_of_another_choice_is_refused) {
  Course course;
  const std::unique_ptr<Attempt> now = attempt(course);
  save_checkpoint(folder_ / "checkpoints", 1, now->adapter, now->optimizer, {}, 1);
  course.chosen = Chosen{{1, {0, 2, 3, 6}}, {3, {5}}};  // as many, but others
  const std::unique_ptr<Attempt> other = attempt(course);
  try {
    load_newest_checkpoint(folder_ / "checkpoints", other->adapter, other->optimizer, {},
                           [](const std::string&) {});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_THAT(error.parts().what, testing::HasSubstr("choice of experts"));
  }
}

TEST_F(ChosenExpertsTraining, the_file_has_every_expert_and_evaluates_as_what_was_trained) {
  Course course;
  const std::unique_ptr<Attempt> now = attempt(course);
  for (int s = 0; s < course.steps; ++s) now->trainer->step(s);
  write_peft_adapter(folder_ / "adapter", now->adapter, now->model.spec, {"tiny", ""});
  const Adapter read = read_peft_adapter(folder_ / "adapter", now->model.spec);
  ASSERT_EQ(read.sites().size(), now->adapter.sites().size());
  for (const LoraSite& site : read.sites()) {
    const LoraSite* mine = now->adapter.find(site.layer, site.projection);
    EXPECT_EQ(site.slots(), site.experts) << "servers ask for every expert";
    EXPECT_EQ(site.rank, mine->rank);
    for (std::int64_t e = 0; e < site.experts; ++e) {
      const std::vector<float> factors = of_expert(read.factors(), site, e);
      if (mine->slot(e) >= 0) {
        EXPECT_EQ(factors, of_expert(now->adapter.factors(), *mine, e));
      } else {
        EXPECT_EQ(factors, std::vector<float>(factors.size(), 0.0F)) << site.module << " " << e;
      }
    }
  }
  const Batch batch = now->source.batch_at(99, 0, 1);
  const auto losses = [&](const Adapter* adapter) {
    now->model.decoder->set_adapter(adapter);
    return now->model.decoder->evaluate(token_input(batch)).losses;
  };
  const auto trained = losses(&now->adapter);
  EXPECT_EQ(losses(&read), trained);
  EXPECT_NE(losses(nullptr), trained);
}

}  // namespace
}  // namespace tailor
