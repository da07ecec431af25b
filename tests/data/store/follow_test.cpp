// Packing while the checkpoint is still arriving, with its shards removed as they are done with.

#include <atomic>
#include <fstream>
#include <random>
#include <set>
#include <thread>

#include "tests/data/store/kills.h"

namespace tailor::testing_support {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

class Follow : public StoreTest {
 protected:
  static TinyModel sharded() {
    TinyModel tiny = many_units();
    tiny.layers = 6;
    tiny.experts = 4;
    tiny.shards = 5;
    return tiny;
  }
  void make(const TinyModel& tiny) {
    maker_ = std::make_unique<ModelMaker>(tiny);
    maker_->write(origin());
    pack_store(origin(), folder_ / "whole", asked());
    make_folders(model());
  }
  fs::path origin() const { return folder_ / "origin"; }
  static PackOptions asked() { return options(int4_of(), as(WeightKind::nf4)); }
  static PackOptions following(bool remove = false) {
    PackOptions out = asked();
    out.follow = true;
    out.delete_source = remove;
    return out;
  }
  void bring(const std::string& name) {
    fs::copy_file(origin() / name, model() / (name + ".incomplete"));
    fs::rename(model() / (name + ".incomplete"), model() / name);
  }
  /// In place, piece by piece.
  void grow(const std::string& name) {
    const std::string bytes = read_text(origin() / name);
    FileWriter writer(model() / name);
    for (std::size_t at = 0; at < bytes.size(); at += bytes.size() / 5 + 1) {
      writer.write(std::string_view(bytes).substr(at, bytes.size() / 5 + 1));
      writer.flush();
      pause_seconds(0.03);
    }
    writer.close();
  }
  void bring_index() {
    for (const char* name :
         {"config.json", "tokenizer_config.json", "model.safetensors.index.json"}) {
      bring(name);
    }
  }
  std::set<std::string> shards_there() const {
    std::set<std::string> out;
    for (const auto& entry : fs::directory_iterator(model())) {
      if (entry.path().extension() == ".safetensors") out.insert(entry.path().filename());
    }
    return out;
  }
  std::unique_ptr<ModelMaker> maker_;
};

TEST_F(Follow, shards_that_arrive_by_rename_and_in_place_and_out_of_order) {
  make(sharded());
  PackProcess process(model(), store(), following());
  pause_seconds(0.1);
  EXPECT_TRUE(process.running()) << "waits for an index";
  bring_index();
  for (const std::size_t i : {3U, 0U, 1U, 4U, 2U}) {
    pause_seconds(0.05);
    EXPECT_TRUE(process.running()) << "waits for shards";
    if (i % 2 == 0) {
      bring(maker_->shard_name(i));
    } else {
      grow(maker_->shard_name(i));
    }
  }
  EXPECT_EQ(process.wait(), 0);
  EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
  EXPECT_EQ(shards_there().size(), 5U) << "not asked to remove any";
}

TEST_F(Follow, a_single_file_that_grows_in_place) {
  TinyModel tiny = sharded();
  tiny.shards = 1;
  make(tiny);
  PackProcess process(model(), store(), following(true));
  bring("config.json");
  bring("tokenizer_config.json");
  grow("model.safetensors");
  EXPECT_EQ(process.wait(), 0);
  EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
  EXPECT_THAT(shards_there(), IsEmpty());
  // Once more: nothing is left to pack from, and nothing is needed.
  EXPECT_EQ(PackProcess(model(), store(), following(true)).wait(), 0);
}

TEST_F(Follow, an_index_and_a_config_that_are_still_being_written_are_waited_for) {
  make(sharded());
  write_atomically(model() / "config.json", read_text(origin() / "config.json").substr(0, 40));
  write_atomically(model() / "model.safetensors.index.json", "{\"weight_map\": {\"model.emb");
  PackProcess process(model(), store(), following());
  pause_seconds(0.1);
  ASSERT_TRUE(process.running());
  bring_index();
  for (std::size_t i = 0; i < 5; ++i) bring(maker_->shard_name(i));
  EXPECT_EQ(process.wait(), 0);
  EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
}

TEST_F(Follow, what_is_waited_for_is_told) {
  make(sharded());
  PackOptions waits = following();
  std::vector<std::string> told;
  int step = 0;
  waits.progress = [&](const PackProgress& at) {
    if (!at.waiting_for.empty() && (told.empty() || told.back() != at.waiting_for)) {
      told.push_back(at.waiting_for);
    }
  };
  waits.stop = [&] {
    if (told.size() == 1 && step == 0) {
      bring_index();
      bring(maker_->shard_name(0));
      bring(maker_->shard_name(1));
      step = 1;
    }
    if (step == 1 && told.size() >= 2) {
      const std::string bytes = read_text(origin() / maker_->shard_name(2));
      write_atomically(model() / maker_->shard_name(2), bytes.substr(0, bytes.size() / 2));
      step = 2;
    }
    return step == 2 && told.back().find("not whole yet") != std::string::npos;
  };
  error_of([&] { pack_store(model(), store(), waits); }, folder_, Fault::stopped);
  ASSERT_GE(told.size(), 3U);
  EXPECT_EQ(told.front(), "config.json");
  EXPECT_THAT(told, testing::Contains("model-00003-of-00005.safetensors"));
  EXPECT_THAT(told.back(), AllOf(HasSubstr("model-00003-of-00005.safetensors (not whole yet: "),
                                 HasSubstr("tensor data should end at byte")));
}

TEST_F(Follow, stopped_while_it_waits_goes_on_later) {
  make(sharded());
  PackOptions waits = following();
  waits.stop = [] { return true; };
  EXPECT_THAT(
      error_of([&] { pack_store(model(), store(), waits); }, folder_, Fault::stopped),
      AllOf(HasSubstr("interrupted while waiting for config.json"), HasSubstr("DIR/model")));
  EXPECT_FALSE(fs::exists(store()));
  bring_index();
  for (const std::size_t i : {0U, 1U, 2U}) bring(maker_->shard_name(i));
  waits.stop = [&] { return units_in_journal(store()) >= 10; };
  EXPECT_THAT(error_of([&] { pack_store(model(), store(), waits); }, folder_, Fault::stopped),
              HasSubstr("interrupted while packing"));
  bring(maker_->shard_name(3));
  bring(maker_->shard_name(4));
  const PackReport report = pack_store(model(), store(), following());
  EXPECT_GE(report.units_before, 10);
  EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
}

/// Shards come one at a time, each only when the one before is gone: a disk for the store and one
/// shard is enough. (Two at first: every kind of layer is looked at before the first byte.)
TEST_F(Follow, removed_shards_make_room_for_the_next) {
  make(sharded());
  bring_index();
  bring(maker_->shard_name(0));
  bring(maker_->shard_name(1));
  PackProcess process(model(), store(), following(true));
  for (std::size_t i = 2; i < 5; ++i) {
    ASSERT_TRUE(within(30, [&] { return shards_there().count(maker_->shard_name(i - 2)) == 0; }))
        << i;
    bring(maker_->shard_name(i));
  }
  EXPECT_EQ(process.wait(), 0);
  EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
  EXPECT_THAT(shards_there(), IsEmpty());
}

/// The space of a removed shard is free while packing goes on: nobody holds it open.
TEST_F(Follow, removed_shards_are_held_by_no_descriptor_and_no_map) {
  make(sharded());
  bring_index();
  for (const std::size_t i : {0U, 1U, 2U}) bring(maker_->shard_name(i));
  PackOptions removing = following(true);
  int looks = 0;
  bool held = false;
  removing.stop = [&] {
    if (shards_there().count(maker_->shard_name(0)) != 0) return false;
    if (++looks < 100) return false;  // the next look and the workers' next claim come first
    for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
      std::error_code error;
      const std::string target = fs::read_symlink(entry.path(), error).string();
      held = held || target.find(maker_->shard_name(0)) != std::string::npos;
    }
    held = held || read_text("/proc/self/maps").find(maker_->shard_name(0)) != std::string::npos;
    return true;
  };
  error_of([&] { pack_store(model(), store(), removing); }, folder_, Fault::stopped);
  EXPECT_FALSE(held);
}

TEST_F(Follow, what_is_removed_is_in_the_store_whenever_it_is_killed) {
  make(sharded());
  const Store whole = Store::open(folder_ / "whole");
  std::mt19937 random(3);
  int kills = 0, removed = 0;
  PackOptions often = following(true);
  often.poll_seconds = 1e-4;  // syncs, and looks for what can be removed, after nearly every unit
  double seconds = 0.25;
  for (int round = 0; round < 40 && kills < 20; ++round) {
    fs::remove_all(store());
    fs::remove_all(model());
    make_folders(model());
    bring_index();
    for (std::size_t i = 0; i < 5; ++i) bring(maker_->shard_name(i));
    while (true) {
      const double began = seconds_now();
      PackProcess process(model(), store(), often);
      pause_seconds(std::uniform_real_distribution<double>(0, seconds)(random));
      if (!process.running()) {
        EXPECT_EQ(process.code(), 0);
        seconds = std::min(seconds, 1.5 * (seconds_now() - began));
        break;
      }
      process.kill();
      ++kills;
      seconds *= 1.2;  // however slow the machine has become
      // Every unit of a shard that is gone is in the journal, and its bytes are in the store.
      std::ifstream journal(store() / kJournalName);
      std::set<UnitId> kept;
      for (std::string line; std::getline(journal, line);) {
        const Json json = Json::parse(line, nullptr, false);
        if (!json.is_object() || !json.contains("hash")) continue;
        kept.insert({static_cast<UnitKind>(json["kind"].get<int>()),
                     json["layer"].get<std::int64_t>(), json["index"].get<std::int64_t>()});
      }
      const auto there = shards_there();
      removed += static_cast<int>(5 - there.size());
      const Checkpoint origin_checkpoint = Checkpoint::open(origin());
      const bool finished = fs::exists(store() / kManifestName);
      for (const StoredUnit& unit : whole.layout().units) {
        for (const auto& matrix : unit_matrices(whole.spec(), unit.id, true)) {
          for (const auto& shard : origin_checkpoint.promised_shards(matrix.name)) {
            if (there.count(shard) != 0 || finished) continue;
            ASSERT_EQ(kept.count(unit.id), 1U) << unit_text(unit.id) << " in " << shard;
          }
        }
        if (kept.count(unit.id) == 0) continue;
        const std::string name = whole.layout().files[static_cast<std::size_t>(unit.file)].name;
        const std::string tile = read_text(store() / name);
        EXPECT_NO_THROW(
            whole.check_hash(unit, reinterpret_cast<const std::byte*>(tile.data()) + unit.offset));
      }
    }
    EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
    EXPECT_THAT(shards_there(), IsEmpty());
  }
  EXPECT_GE(kills, 20);
  EXPECT_GT(removed, 0);
  RecordProperty("kills", kills);
  RecordProperty("shards_gone_at_a_kill", removed);
}

/// The Hugging Face cache keeps files as links to blobs: those hold the space.
TEST_F(Follow, links_into_the_cache_are_removed_with_what_they_name) {
  make(sharded());
  const fs::path snapshot = folder_ / "hub/snapshots/main", blobs = folder_ / "hub/blobs";
  make_folders(snapshot);
  make_folders(blobs);
  for (const auto& entry : fs::directory_iterator(origin())) {
    const std::string name = entry.path().filename();
    fs::copy_file(entry.path(), blobs / ("blob-" + name));
    fs::create_symlink("../../blobs/blob-" + name, snapshot / name);
  }
  pack_store(snapshot, store(), following(true));
  EXPECT_THAT(differing_files(store(), folder_ / "whole"), IsEmpty());
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_FALSE(fs::is_symlink(snapshot / maker_->shard_name(i)));
    EXPECT_FALSE(fs::exists(blobs / ("blob-" + maker_->shard_name(i))));
  }
  EXPECT_TRUE(fs::exists(snapshot / "config.json"));
}

TEST_F(Follow, a_matrix_in_another_form_than_its_neighbours_is_refused_before_its_shard_goes) {
  TinyModel tiny = sharded();
  ModelMaker maker(tiny);
  const std::string router = "model.layers.5.feed_forward.router.weight";
  MadeTensor& tensor = maker.tensor(router);
  const auto count = static_cast<std::size_t>(tensor.shape[0] * tensor.shape[1]);
  tensor = {Dtype::f32, tensor.shape, bytes_of(std::vector<float>(count, 0.5F))};
  maker.write(model());
  // All there: it is as it is.
  pack_store(model(), store(), asked());
  EXPECT_THAT(problems(store(), model()), IsEmpty());
  fs::remove_all(store());
  pack_store(model(), store(), following());
  EXPECT_THAT(problems(store(), model()), IsEmpty());
  fs::remove_all(store());
  // Its shard comes last: the store was laid out by then.
  fs::rename(model() / maker.shard_name(4), folder_ / "late");
  PackOptions late = following(true);
  late.stop = [&] {
    if (units_in_journal(store()) >= 10 && fs::exists(folder_ / "late")) {
      fs::rename(folder_ / "late", model() / maker.shard_name(4));
    }
    return false;
  };
  EXPECT_THAT(
      error_of([&] { pack_store(model(), store(), late); }, folder_),
      AllOf(HasSubstr("published as f32, the store was laid out for bf16"), HasSubstr(router)));
  EXPECT_TRUE(fs::exists(model() / maker.shard_name(4)));
}

TEST_F(Follow, a_shard_that_is_not_the_index_s_is_refused) {
  make(sharded());
  bring_index();
  bring(maker_->shard_name(0));
  fs::copy_file(origin() / maker_->shard_name(0), model() / maker_->shard_name(1));
  EXPECT_THROW(pack_store(model(), store(), following(true)), Error);
  EXPECT_EQ(shards_there().size(), 2U);
}

}  // namespace
}  // namespace tailor::testing_support
