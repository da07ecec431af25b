// Several ranks against one: the same losses, the same factors, each holding its part.

#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <fstream>

#include "data/store/pack.h"
#include "recipes/ring.h"
#include "tests/support/fixture.h"
#include "tests/support/on_ranks.h"
#include "tests/support/training_run.h"
#include "trainer/run_state.h"
#include "trainer/stream/store_weights.h"
#include "trainer/trainer.h"

namespace tailor {
namespace {

using namespace testing_support;
using ::testing::HasSubstr;

const RandomSource::Shape kRows = {{13, 9, 5, 18, 7}, {13, 5, 7}, 4, 3};
constexpr double kMaxNorm = 0.05;

struct Course {
  std::string model = "llama4_maverick_tiny";
  at::ScalarType dtype = at::kFloat;
  WeightKind kind = WeightKind::bf16;
  bool as_is = true;
  std::optional<std::int64_t> resident_bytes{};  ///< null: all parts stay in memory
  Activations keep = Activations::recomputed;
  bool state_on_disk = false;
  int steps = 6;
  std::int64_t expert_rank = 3;
  RandomSource::Shape rows = kRows;
};

struct Outcome {
  std::vector<double> losses, norms, eval_losses;
  std::vector<float> factors;
  std::vector<std::int64_t> streamed_bytes;
};

class Sharded : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::path(testing::TempDir()) / ("sharded_" + std::to_string(::getpid()));
    fs::create_directories(folder_ / "scratch");
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::shared_ptr<const Store> store(const Course& course) const {
    const fs::path to = folder_ / (course.model + std::to_string(static_cast<int>(course.kind)) +
                                   std::to_string(course.as_is));
    if (!fs::exists(to)) {
      PackOptions options;
      const FormatChoice choice{course.as_is, course.kind, 0};
      options.formats = {choice, choice};
      options.threads = 1;
      pack_store(golden(course.model) / "model", to, options);
    }
    return std::make_shared<Store>(Store::open(to));
  }

  /// One rank's side of a run; members in the order they need each other.
  struct Attempt {
    Attempt(const Course& course, std::shared_ptr<const Store> of, Ranks& ranks,
            const ArenaHome& home)
        : store(std::move(of)),
          source(store->spec().vocab, course.rows),
          adapter(Adapter::create(store->spec(), lora(course), 7, home)),
          optimizer(adapter, adamw(), home) {
      StreamOptions stream;
      stream.host_bytes = course.resident_bytes;
      stream.ranks = ranks.alone() ? nullptr : &ranks;
      auto weights = StoreWeights::open(store, course.dtype, stream);
      facts = weights->facts();
      decoder = Decoder::create(std::move(weights), course.dtype);
      TrainerOptions options;
      options.schedule = {ScheduleKind::linear, 2e-3, 2, course.steps};
      options.adamw = adamw();
      options.max_grad_norm = kMaxNorm;
      options.dropout = 0.1;
      options.seed = 5;
      options.keep = course.keep;
      if (course.state_on_disk) options.paged_experts = home;
      options.ranks = &ranks;
      options.count_experts_every = 1;
      trainer = std::make_unique<Trainer>(*decoder, adapter, optimizer, source, options);
    }
    static LoraOptions lora(const Course& course) {
      LoraOptions options;
      options.rank = 4;
      options.expert_rank = course.expert_rank;
      options.targets = {"all"};
      return options;
    }
    static AdamWOptions adamw() { return {0.9, 0.95, 1e-8, 0.1, 4}; }

    std::optional<StateShare> share(Ranks& ranks) const {
      if (trainer->sharded() == nullptr) return std::nullopt;
      return StateShare{ranks, trainer->sharded()->shards()};
    }

    std::shared_ptr<const Store> store;
    StreamFacts facts;
    RandomSource source;
    Adapter adapter;
    AdamW optimizer;
    std::unique_ptr<Decoder> decoder;
    std::unique_ptr<Trainer> trainer;
  };

  std::unique_ptr<Attempt> attempt(const Course& course, Ranks& ranks) const {
    at::set_num_threads(1);
    return std::make_unique<Attempt>(
        course, store(course), ranks,
        course.state_on_disk ? ArenaHome{folder_ / "scratch"} : ArenaHome{});
  }

  static double evaluated(Attempt& now, Ranks& ranks) {
    now.decoder->set_adapter(&now.adapter);
    const Batch batch = now.source.batch_at(1000, ranks.rank(), ranks.size());
    const LossResult result = now.decoder->evaluate(token_input(batch));
    return sum_over_ranks(ranks, result.loss_sum) /
           sum_over_ranks(ranks, static_cast<double>(result.tokens));
  }

  Outcome run(const Course& course, int N) const {
    Outcome out;
    store(course);
    on_ranks(N, [&](Ranks& ranks) {
      const auto now = attempt(course, ranks);
      Outcome mine;
      for (int s = 0; s < course.steps; ++s) {
        const StepRecord record = now->trainer->step(s, s + 1 < course.steps && s != 2);
        EXPECT_GT(record.grad_norm, kMaxNorm) << "clipping must be active in every step";
        mine.losses.push_back(record.loss);
        mine.norms.push_back(record.grad_norm);
        mine.streamed_bytes.push_back(record.stream_bytes);
        if (s == 2) mine.eval_losses.push_back(evaluated(*now, ranks));
      }
      now->trainer->flush();
      if (now->trainer->sharded() != nullptr) now->trainer->sharded()->gather_to_first();
      if (!ranks.first()) return;
      mine.factors.assign(now->adapter.factors().begin(), now->adapter.factors().end());
      out = std::move(mine);
    });
    return out;
  }

  fs::path folder_;
};

/// Bytes of an arena's pages that are in memory. The mapping's own figure would count its
/// neighbours, which the system may have joined to it.
std::int64_t resident_bytes_of(const Arena& arena) {
  constexpr std::size_t kPage = 4096;
  std::vector<unsigned char> pages((static_cast<std::size_t>(arena.size()) + kPage - 1) / kPage);
  EXPECT_EQ(::mincore(arena.data(), static_cast<std::size_t>(arena.size()), pages.data()), 0);
  return std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1U) != 0; }) *
         static_cast<std::int64_t>(kPage);
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / size);
}

void expect_close(const Outcome& got, const Outcome& want, const std::string& how) {
  ASSERT_EQ(got.losses.size(), want.losses.size());
  for (std::size_t s = 0; s < want.losses.size(); ++s) {
    EXPECT_NEAR(got.losses[s], want.losses[s], 1e-5 * want.losses[s]) << how << ", step " << s;
    EXPECT_NEAR(got.norms[s], want.norms[s], 1e-4 * want.norms[s]) << how << ", step " << s;
  }
  ASSERT_EQ(got.eval_losses.size(), 1U);
  EXPECT_NEAR(got.eval_losses[0], want.eval_losses[0], 1e-5 * want.eval_losses[0]) << how;
  EXPECT_LT(distance(got.factors, want.factors), 1e-3) << how;
}

void expect_same_bits(const Outcome& got, const Outcome& want, const std::string& how) {
  EXPECT_EQ(got.losses, want.losses) << how;
  EXPECT_EQ(got.norms, want.norms) << how;
  EXPECT_EQ(got.eval_losses, want.eval_losses) << how;
  ASSERT_EQ(got.factors.size(), want.factors.size());
  EXPECT_EQ(
      std::memcmp(got.factors.data(), want.factors.data(), got.factors.size() * sizeof(float)), 0)
      << how;
}

TEST_F(Sharded, any_number_of_ranks_takes_the_path_of_one) {
  for (const char* model : {"llama4_maverick_tiny", "deepseek_v3_tiny", "qwen2_tiny"}) {
    Course course;
    course.model = model;
    const Outcome one = run(course, 1);
    for (const int N : {2, 3, 4}) {
      const std::string how = std::string(model) + " on " + std::to_string(N);
      expect_close(run(course, N), one, how);
    }
  }
}

TEST_F(Sharded, ranks_without_rows_join_in) {
  Course course;
  course.rows.lengths = {13, 9};
  const Outcome one = run(course, 1);
  expect_close(run(course, 3), one, "two rows on 3");
  course.model = "deepseek_v3_tiny";
  course.keep = Activations::kept;
  expect_close(run(course, 5), run(course, 1), "two rows on 5");
}

TEST_F(Sharded, two_runs_give_the_same_bits_streamed_resident_or_with_the_state_on_disk) {
  for (const char* model : {"llama4_maverick_tiny", "deepseek_v3_tiny"}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      for (const Activations keep : {Activations::recomputed, Activations::kept}) {
        Course course;
        course.model = model;
        course.dtype = dtype;
        course.keep = keep;
        course.as_is = false;
        course.kind = WeightKind::int4;
        const Outcome want = run(course, 3);
        expect_same_bits(run(course, 3), want, "again");
        course.resident_bytes = 0;
        const Outcome streamed = run(course, 3);
        expect_same_bits(streamed, want, "streamed");
        course.state_on_disk = true;
        expect_same_bits(run(course, 3), want, "streamed, state on disk");
      }
    }
  }
}

TEST_F(Sharded, ranks_together_read_layers_twice_and_the_head_once_a_step_and_each_holds_its_part) {
  Course course;
  course.as_is = false;
  course.kind = WeightKind::int4;
  course.resident_bytes = 0;
  const Outcome one = run(course, 1);
  std::vector<std::int64_t> expert_rows;
  on_ranks(
      1, [&](Ranks& ranks) { expert_rows = attempt(course, ranks)->trainer->step(0).expert_rows; });
  EXPECT_FALSE(expert_rows.empty());
  for (const int N : {2, 4}) {
    course.resident_bytes = 0;
    std::vector<StreamFacts> facts(static_cast<std::size_t>(N));
    std::vector<std::int64_t> tile_bytes(static_cast<std::size_t>(N));
    const auto of = store(course);
    on_ranks(N, [&](Ranks& ranks) {
      const auto now = attempt(course, ranks);
      const StepRecord record = now->trainer->step(0);
      const RingCounters counters = now->decoder->weights().counters();
      const auto at = static_cast<std::size_t>(ranks.rank());
      EXPECT_EQ(record.expert_rows, expert_rows);
      facts[at] = now->facts;
      tile_bytes[at] = counters.streamed_bytes - counters.row_bytes;
      EXPECT_EQ(tile_bytes[at], now->facts.streamed.step());
      EXPECT_EQ(counters.gathered_bytes, now->facts.gathered.step());
      EXPECT_EQ(record.exchange_weight_bytes, (N - 1) * now->facts.tile_bytes.step());
      EXPECT_GT(record.exchange_factor_bytes, 0);
      EXPECT_GT(record.exchange_gradient_bytes, 0);
    });
    std::int64_t read = 0, received = 0;
    for (std::size_t r = 0; r < facts.size(); ++r) {
      EXPECT_EQ(facts[r].tile_bytes.forward, facts[0].tile_bytes.forward);
      EXPECT_LE(facts[r].streamed.forward, facts[0].tile_bytes.forward / N + 4096 * facts[0].tiles);
      read += facts[r].streamed.forward;
      received += facts[r].gathered.forward;
    }
    EXPECT_EQ(read, facts[0].tile_bytes.forward);
    EXPECT_EQ(received, (N - 1) * facts[0].tile_bytes.forward);
    // All parts in memory: nothing is read, and a rank holds its part alone.
    course.resident_bytes.reset();
    on_ranks(N, [&](Ranks& ranks) {
      const auto now = attempt(course, ranks);
      now->trainer->step(0);
      const RingCounters counters = now->decoder->weights().counters();
      EXPECT_EQ(counters.streamed_bytes, counters.row_bytes);
      EXPECT_EQ(now->facts.resident_bytes,
                facts[static_cast<std::size_t>(ranks.rank())].streamed.forward);
      // Beside the slots a rank's part, and rows of the embedding up to its part of that.
      EXPECT_EQ(now->decoder->weights().memory_bytes(),
                now->facts.resident_bytes + now->facts.ring_bytes + now->facts.kept_row_bytes);
      EXPECT_LE(now->facts.kept_row_bytes, now->facts.embedding_bytes / N);
      // What was read of the embedding stays.
      now->trainer->step(0);
      EXPECT_LT(now->decoder->weights().counters().row_bytes - counters.row_bytes,
                counters.row_bytes);
    });
  }
}

/// What docs/ranks.md says a rank holds of the frozen weights, from the store's layout alone.
class Holdings {
 public:
  Holdings(const Store& store, int rank, int ranks) : store_(store), rank_(rank), ranks_(ranks) {
    const ModelSpec& spec = store.spec();
    std::int64_t layer_of_experts = -1;
    const UnitKind head = spec.tied_head ? UnitKind::embedding : UnitKind::head;
    for (const StoredUnit& unit : store.layout().units) {
      if (unit.id.kind == UnitKind::attention) add(0, unit.bytes);
      if (unit.id.kind == UnitKind::feed_forward) add(1, unit.bytes);
      if (unit.id.kind == head) add(3, unit.bytes);
      if (unit.id.kind != UnitKind::expert) continue;
      // The tiny models' experts of a layer are one tile.
      EXPECT_LT(unit.bytes * spec.experts, kTileBytes);
      if (unit.id.layer == layer_of_experts) continue;
      layer_of_experts = unit.id.layer;
      std::int64_t experts = 0;
      for (const StoredUnit& other : store.layout().units) {
        const bool same = other.id.kind == UnitKind::expert && other.id.layer == unit.id.layer;
        experts += same ? other.bytes : 0;
      }
      add(2, experts);
    }
  }
  std::int64_t total() const { return total_; }
  std::int64_t tiles() const { return tiles_; }
  std::int64_t parts() const { return parts_; }
  /// For whole tiles; a rank alone uses them where they are, or where they are read to.
  std::int64_t slots() const {
    if (ranks_ == 1) return 0;
    return 2 * (whole_[0] + whole_[1]) + 3 * (whole_[2] + whole_[3]);
  }
  /// For parts on their way from disk.
  std::int64_t disk_slots() const {
    return 2 * (part_[0] + part_[1]) + part_[2] * ring_slots(part_[2], kRingBytes) +
           part_[3] * ring_slots(part_[3], kHeadRingBytes);
  }
  /// A rank alone keeps the embedding, one of several rows up to its part of them.
  std::int64_t embedding() const {
    for (const StoredUnit& unit : store_.layout().units) {
      if (unit.id.kind != UnitKind::embedding) continue;
      if (ranks_ == 1) return store_.layout().files[static_cast<std::size_t>(unit.file)].bytes;
      return store_.spec().vocab / ranks_ *
             code_bytes(unit.matrices[0].format, 1, store_.spec().hidden);
    }
    return 0;
  }

 private:
  void add(std::size_t pool, std::int64_t bytes) {
    const std::int64_t part = (bytes / ranks_ + (bytes % ranks_ != 0 ? 1 : 0) + 4095) / 4096 * 4096;
    const std::int64_t mine = std::clamp<std::int64_t>(bytes - rank_ * part, 0, part);
    total_ += bytes;
    parts_ += mine;
    ++tiles_;
    whole_[pool] = std::max(whole_[pool], part * ranks_);
    part_[pool] = std::max(part_[pool], mine);
  }
  const Store& store_;
  int rank_, ranks_;
  std::int64_t total_ = 0, parts_ = 0, tiles_ = 0;
  std::array<std::int64_t, 4> whole_{}, part_{};  ///< the largest of each pool
};

TEST_F(Sharded, a_rank_holds_its_part_of_every_tile_and_slots_and_not_a_byte_more) {
  for (const char* model : {"llama4_maverick_tiny", "deepseek_v3_tiny", "qwen2_tiny"}) {
    Course course;
    course.model = model;
    course.as_is = false;
    course.kind = WeightKind::int4;
    const auto of = store(course);
    for (const int N : {1, 2, 3, 4}) {
      std::atomic<std::int64_t> all_parts{0};
      on_ranks(N, [&](Ranks& ranks) {
        const Holdings want(*of, ranks.rank(), N);
        StreamOptions options;
        options.ranks = ranks.alone() ? nullptr : &ranks;
        const auto memory_bytes = [&] {
          const auto weights = StoreWeights::open(of, at::kFloat, options);
          EXPECT_EQ(weights->facts().tiles, want.tiles());
          EXPECT_EQ(weights->facts().tile_bytes.forward, want.total());
          weights->read_through(StoreWeights::Pass::train_recompute);
          return weights->memory_bytes();
        };
        const std::string how = std::string(model) + ", rank " + std::to_string(ranks.rank()) +
                                " of " + std::to_string(N);
        EXPECT_EQ(memory_bytes(), want.parts() + want.slots() + want.embedding()) << how;
        options.host_bytes = 0;
        EXPECT_EQ(memory_bytes(), want.slots() + want.disk_slots()) << how << ", from disk";
        // A part is a whole number of blocks.
        EXPECT_LE(want.parts(), want.total() / N + 4096 * want.tiles());
        all_parts += want.parts();
      });
      EXPECT_EQ(all_parts, Holdings(*of, 0, 1).total());
    }
  }
}

TEST_F(Sharded, what_other_ranks_keep_takes_no_memory) {
  Course course;
  course.expert_rank = 900;  // some MB a layer
  constexpr int N = 4;
  store(course);
  on_ranks(N, [&](Ranks& ranks) {
    const auto now = attempt(course, ranks);
    now->trainer->step(0);
    now->trainer->flush();
    const std::int64_t size = now->adapter.arena().size();
    ASSERT_GT(size, 12 << 20);
    const std::int64_t part = size / N;
    const std::int64_t slack = 16 * 4096 + now->adapter.arena().size() / 50;
    for (const Arena* arena :
         {&now->adapter.arena(), &now->optimizer.first_arena(), &now->optimizer.second_arena()}) {
      EXPECT_LE(resident_bytes_of(*arena), part + slack);
      EXPECT_GE(resident_bytes_of(*arena), part - slack);
    }
    const std::int64_t count = now->trainer->sharded()->shards().count();
    EXPECT_GE(count, now->adapter.parameter_count() / N);
    EXPECT_LT(count, now->adapter.parameter_count() / N + N * 4);
  });
}

TEST_F(Sharded, resumes_on_any_number_of_ranks) {
  for (const char* model : {"llama4_maverick_tiny", "deepseek_v3_tiny"}) {
    Course course;
    course.model = model;
    course.steps = 8;
    const Outcome unbroken = run(course, 1);
    Outcome pieces;
    const fs::path checkpoints = folder_ / "checkpoints";
    fs::remove_all(checkpoints);
    int from = 0;
    for (const int N : {4, 2, 1, 4}) {
      const int to = from + 2;
      on_ranks(N, [&](Ranks& ranks) {
        const auto now = attempt(course, ranks);
        const auto share = now->share(ranks);
        const StateShare* mine = share ? &*share : nullptr;
        if (from > 0) {
          const auto found = load_newest_checkpoint(
              checkpoints, now->adapter, now->optimizer, {},
              [](const std::string& text) { ADD_FAILURE() << text; }, mine);
          EXPECT_TRUE(found && found->step == from);
        }
        for (int s = from; s < to; ++s) {
          const StepRecord record = now->trainer->step(s);
          if (!ranks.first()) continue;
          pieces.losses.push_back(record.loss);
          pieces.norms.push_back(record.grad_norm);
        }
        now->trainer->flush();
        save_checkpoint(checkpoints, to, now->adapter, now->optimizer, {}, 2, mine);
        if (mine != nullptr) now->trainer->sharded()->gather_to_first();
        if (!ranks.first()) return;
        pieces.factors.assign(now->adapter.factors().begin(), now->adapter.factors().end());
      });
      from = to;
    }
    for (std::size_t s = 0; s < unbroken.losses.size(); ++s) {
      EXPECT_NEAR(pieces.losses[s], unbroken.losses[s], 1e-5 * unbroken.losses[s]);
    }
    EXPECT_LT(distance(pieces.factors, unbroken.factors), 1e-3);
  }
}

TEST_F(Sharded, a_resumed_run_of_one_rank_count_is_the_unbroken_one_to_the_bit) {
  Course course;
  course.dtype = at::kBFloat16;
  const Outcome unbroken = run(course, 3);
  const fs::path checkpoints = folder_ / "checkpoints";
  Outcome pieces;
  for (const int from : {0, 3}) {
    on_ranks(3, [&](Ranks& ranks) {
      const auto now = attempt(course, ranks);
      const auto share = now->share(ranks);
      if (from > 0) {
        const auto found = load_newest_checkpoint(
            checkpoints, now->adapter, now->optimizer, {},
            [](const std::string& text) { ADD_FAILURE() << text; }, &*share);
        EXPECT_TRUE(found && found->step == from);
      }
      for (int s = from; s < from + 3; ++s) {
        const StepRecord record = now->trainer->step(s);
        if (ranks.first()) pieces.losses.push_back(record.loss);
      }
      now->trainer->flush();
      save_checkpoint(checkpoints, from + 3, now->adapter, now->optimizer, {}, 1, &*share);
      now->trainer->sharded()->gather_to_first();
      if (!ranks.first()) return;
      pieces.factors.assign(now->adapter.factors().begin(), now->adapter.factors().end());
    });
  }
  EXPECT_EQ(pieces.losses, unbroken.losses);
  EXPECT_EQ(pieces.factors, unbroken.factors);
}

TEST_F(Sharded, a_checkpoint_with_a_damaged_or_missing_part_is_passed_over_by_all) {
  Course course;
  store(course);
  const fs::path checkpoints = folder_ / "checkpoints";
  on_ranks(2, [&](Ranks& ranks) {
    const auto now = attempt(course, ranks);
    const auto share = now->share(ranks);
    for (int s = 0; s < 3; ++s) {
      now->trainer->step(s);
      now->trainer->flush();
      save_checkpoint(checkpoints, s + 1, now->adapter, now->optimizer, {}, 3, &*share);
    }
  });
  const fs::path newest = checkpoints / "step-00000003", second = checkpoints / "step-00000002";
  {
    std::fstream file(newest / "state-00002-of-00002.safetensors",
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(3000);
    file.put('!');
  }
  fs::remove(second / "state-00001-of-00002.safetensors");
  for (const int N : {1, 2, 3}) {
    on_ranks(N, [&](Ranks& ranks) {
      const auto now = attempt(course, ranks);
      const auto share = now->share(ranks);
      std::vector<std::string> said;
      const auto found = load_newest_checkpoint(
          checkpoints, now->adapter, now->optimizer, {},
          [&](const std::string& text) { said.push_back(text); }, share ? &*share : nullptr);
      ASSERT_TRUE(found);
      EXPECT_EQ(found->step, 1);
      ASSERT_EQ(said.size(), 2U);
      EXPECT_THAT(said[0], HasSubstr("step-00000003 cannot be used"));
      EXPECT_THAT(said[0], HasSubstr("does not match its checksum"));
    });
  }
}

TEST_F(Sharded, a_save_that_fails_on_one_rank_fails_on_all_and_keeps_what_was_there) {
  Course course;
  store(course);
  const fs::path checkpoints = folder_ / "checkpoints";
  on_ranks(3, [&](Ranks& ranks) {
    const auto now = attempt(course, ranks);
    const auto share = now->share(ranks);
    now->trainer->step(0);
    now->trainer->flush();
    save_checkpoint(checkpoints, 1, now->adapter, now->optimizer, {}, 3, &*share);
    // Rank 1 sees another folder than the others.
    const fs::path mine = ranks.rank() == 1 ? folder_ / "elsewhere" : checkpoints;
    try {
      save_checkpoint(mine, 2, now->adapter, now->optimizer, {}, 3, &*share);
      ADD_FAILURE() << "saved without a part";
    } catch (const Error& error) {
      EXPECT_EQ(error.fault(), Fault::io);
      EXPECT_THAT(error.parts().what, HasSubstr("is not the one that rank 0 sees"));
      EXPECT_EQ(error.parts().what.starts_with("rank 1 failed saving"), ranks.rank() != 1);
    }
    ranks.barrier();
  });
  EXPECT_TRUE(fs::exists(checkpoints / "step-00000001" / "manifest.json"));
  EXPECT_EQ(std::distance(fs::directory_iterator(checkpoints), fs::directory_iterator()), 1);
}

TEST_F(Sharded, a_diverged_step_ends_all_ranks_alike) {
  Course course;
  store(course);
  on_ranks(2, [&](Ranks& ranks) {
    const auto now = attempt(course, ranks);
    now->trainer->step(0);
    now->trainer->flush();
    if (ranks.rank() == 1) {
      const FactorRange mine = now->trainer->sharded()->shards().mine(1);
      std::fill(now->adapter.factors().begin() + mine.begin,
                now->adapter.factors().begin() + mine.end, std::numeric_limits<float>::quiet_NaN());
      for (int l = 0; l < now->trainer->sharded()->shards().layers(); ++l) {
        now->decoder->cast_factors().cast(now->trainer->sharded()->shards().mine(l));
      }
    }
    try {
      now->trainer->step(1);
      ADD_FAILURE() << "went on with NaN";
    } catch (const Error& error) {
      EXPECT_THAT(error.parts().what, HasSubstr("diverged"));
    }
    EXPECT_EQ(now->optimizer.pending(), 0);
    EXPECT_EQ(now->optimizer.steps(), 1);
  });
}

}  // namespace
}  // namespace tailor
