// Packing in every format, from every kind of checkpoint: each matrix of each expert and layer is
// its checkpoint's within what the format can lose, and nothing else passes for it.

#include "tests/data/store/store_fixture.h"

namespace tailor::testing_support {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;

struct Case {
  const char* name;
  FormatChoice choice;
};
const std::vector<Case> kChoices = {{"as_is", {}},
                                    {"int4", int4_of()},
                                    {"int4_128", int4_of(128)},
                                    {"int4_64", int4_of(64)},
                                    {"int4_32", int4_of(32)},
                                    {"int4_ragged", int4_of(50)},
                                    {"nf4", as(WeightKind::nf4)},
                                    {"fp8", as(WeightKind::fp8)},
                                    {"bf16", as(WeightKind::bf16)},
                                    {"f32", as(WeightKind::f32)}};

/// A matrix of a store, decoded.
std::vector<float> decoded(const Store& store, const UnitId& id, MatrixRole role) {
  const StoredUnit* unit = store.layout().find(id);
  const std::string file = read_text(store.path_of(*unit));
  const auto* bytes = reinterpret_cast<const std::byte*>(file.data()) + unit->offset;
  for (const MatrixPlace& place : unit->matrices) {
    if (place.role != role) continue;
    std::vector<float> out(static_cast<std::size_t>(place.rows * place.columns));
    decode_rows(place.in(bytes), 0, place.rows, out.data());
    return out;
  }
  throw std::runtime_error("no such matrix");
}

class Formats : public StoreTest {
 protected:
  void pack(FormatChoice experts, FormatChoice others, const fs::path& from) {
    fs::remove_all(store());
    const PackReport report = pack_store(from, store(), options(experts, others));
    EXPECT_EQ(report.units_before, 0);
    EXPECT_THAT(problems(store()), IsEmpty());
    EXPECT_THAT(problems(store(), from), IsEmpty());
  }
};

TEST_F(Formats, every_format_of_experts_and_others_from_fused_and_single_experts) {
  for (const bool fused : {true, false}) {
    TinyModel tiny;
    tiny.fused = fused;
    ModelMaker(tiny).write(model());
    for (const Case& choice : kChoices) {
      SCOPED_TRACE(std::string(choice.name) + (fused ? ", fused" : ", one by one"));
      pack(choice.choice, {}, model());
      pack({}, choice.choice, model());
      pack(choice.choice, choice.choice, model());
    }
    fs::remove_all(model());
  }
}

TEST_F(Formats, every_source_can_become_every_format) {
  for (const Published as_published : {Published::f32, Published::f16, Published::fp8_blocks,
                                       Published::fp8_rows, Published::int4}) {
    TinyModel tiny;
    tiny.fused = as_published != Published::fp8_blocks && as_published != Published::int4;
    tiny.experts_as = tiny.others_as = as_published;
    ModelMaker(tiny).write(model());
    for (const Case& choice : kChoices) {
      SCOPED_TRACE(std::string(choice.name) + " from " +
                   std::to_string(static_cast<int>(as_published)));
      pack(choice.choice, choice.choice, model());
    }
    fs::remove_all(model());
  }
}

TEST_F(Formats, of_the_golden_models) {
  for (const char* name :
       {"llama4_maverick_tiny", "llama4_scout_tiny", "llama4_conditional_tiny", "llama_tiny"}) {
    for (const Case& choice : kChoices) {
      SCOPED_TRACE(std::string(name) + " as " + choice.name);
      pack(choice.choice, choice.choice, golden(name));
    }
  }
}

TEST_F(Formats, are_the_ones_asked_for_and_norms_routers_and_vocabulary_stay) {
  ModelMaker(TinyModel{}).write(model());
  pack(int4_of(), as(WeightKind::nf4), model());
  const Store packed = Store::open(store());
  int seen = 0;
  for (const StoredUnit& unit : packed.layout().units) {
    for (const MatrixPlace& place : unit.matrices) {
      ++seen;
      const bool kept = place.rows == 1 || place.role == MatrixRole::router ||
                        place.role == MatrixRole::embedding || place.role == MatrixRole::head;
      const WeightFormat wanted = kept ? WeightFormat::bf16()
                                  : unit.id.kind == UnitKind::expert
                                      ? WeightFormat::int4_for(place.columns)
                                      : WeightFormat::nf4();
      EXPECT_EQ(place.format, wanted) << unit_text(unit.id) << " " << role_name(place.role);
      EXPECT_EQ(place.codes_offset % 64, 0);
      EXPECT_EQ(place.scales_offset % 64, 0);
    }
    EXPECT_EQ(unit.offset % 4096, 0);
    EXPECT_EQ(unit.bytes % 4096, 0);
  }
  EXPECT_GT(seen, 20);
}

TEST_F(Formats, as_they_are_published_are_the_published_numbers) {
  for (const bool fused : {true, false}) {
    TinyModel tiny;
    tiny.fused = fused;
    ModelMaker(tiny).write(model());
    pack({}, {}, model());
    const Store packed = Store::open(store());
    const Checkpoint checkpoint = Checkpoint::open(model());
    SourceReader reader(checkpoint);
    for (std::int64_t e = 0; e < tiny.experts; ++e) {
      for (const PublishedMatrix& matrix : expert_matrices(packed.spec(), 1, e, fused)) {
        std::vector<float> wanted(static_cast<std::size_t>(matrix.rows * matrix.columns));
        reader.read_rows(matrix, 0, matrix.rows, wanted.data());
        EXPECT_EQ(decoded(packed, {UnitKind::expert, 1, e}, matrix.role), wanted);
      }
    }
    fs::remove_all(model());
  }
}

TEST_F(Formats, do_not_depend_on_threads_or_memory) {
  ModelMaker(TinyModel{}).write(model());
  for (const Case& choice : kChoices) {
    pack(choice.choice, choice.choice, model());
    PackOptions one = options(choice.choice, choice.choice);
    one.threads = 1;
    one.memory_bytes_max = std::int64_t{68} << 20;
    pack_store(model(), folder_ / "other", one);
    EXPECT_THAT(differing_files(store(), folder_ / "other"), IsEmpty()) << choice.name;
    fs::remove_all(folder_ / "other");
  }
}

/// Rewrites a store with two units' bytes exchanged: headers, hashes and manifest as if it had
/// been packed so.
void swap_units(const fs::path& folder, const UnitId& one, const UnitId& other) {
  const Store store = Store::open(folder);
  const StoredUnit &a = *store.layout().find(one), &b = *store.layout().find(other);
  ASSERT_EQ(a.bytes, b.bytes);
  ASSERT_EQ(a.file, b.file);
  std::string file = read_text(store.path_of(a));
  const auto size = static_cast<std::size_t>(a.bytes);
  std::string of_a = file.substr(static_cast<std::size_t>(a.offset), size);
  std::string of_b = file.substr(static_cast<std::size_t>(b.offset), size);
  of_a.swap(of_b);
  StoreManifest manifest;
  for (auto [unit, bytes] : {std::pair{&a, &of_a}, std::pair{&b, &of_b}}) {
    write_unit_header({unit->id, store.mark(), unit->bytes, unit->matrices},
                      std::as_writable_bytes(std::span(*bytes)));
    file.replace(static_cast<std::size_t>(unit->offset), size, *bytes);
  }
  manifest.layout = store.layout();
  for (const StoredUnit& unit : store.layout().units) {
    const auto* bytes = unit == a ? &of_a : unit == b ? &of_b : nullptr;
    manifest.hashes.push_back(
        bytes == nullptr
            ? store.hash(unit)
            : hash_unit(reinterpret_cast<const std::byte*>(bytes->data()), unit.bytes));
  }
  manifest.source = store.source();
  manifest.fingerprint = store.fingerprint();
  manifest.forms = store.forms();
  manifest.mark = store.mark();
  change_bytes(store.path_of(a), 0, file.data(), file.size());
  write_atomically(folder / kManifestName, manifest_text(manifest));
}

TEST_F(Formats, swapped_experts_do_not_pass_for_their_checkpoint) {
  for (const Case& choice : kChoices) {
    ModelMaker(TinyModel{}).write(model());
    pack(choice.choice, {}, model());
    swap_units(store(), {UnitKind::expert, 1, 0}, {UnitKind::expert, 1, 2});
    EXPECT_THAT(problems(store()), IsEmpty()) << "its hashes were made to fit";
    const auto found = problems(store(), model());
    ASSERT_EQ(found.size(), 2U) << choice.name;
    EXPECT_THAT(found[0], HasSubstr("layer 1, expert 0: gate"));
    EXPECT_THAT(found[0], HasSubstr("further apart than"));
    EXPECT_THAT(found[1], HasSubstr("layer 1, expert 2: gate"));
    fs::remove_all(model());
  }
}

TEST_F(Formats, a_tile_with_its_old_header_is_refused_by_it) {
  ModelMaker(TinyModel{}).write(model());
  pack(int4_of(), {}, model());
  const Store packed = Store::open(store());
  const StoredUnit& a = *packed.layout().find({UnitKind::expert, 1, 0});
  const StoredUnit& b = *packed.layout().find({UnitKind::expert, 1, 1});
  const std::string file = read_text(packed.path_of(a));
  const std::string tile =
      file.substr(static_cast<std::size_t>(b.offset), static_cast<std::size_t>(b.bytes));
  const auto* bytes = reinterpret_cast<const std::byte*>(tile.data());
  EXPECT_NO_THROW(packed.check_header(b, bytes));
  EXPECT_THAT(error_of([&] { packed.check_header(a, bytes); }, folder_),
              HasSubstr("a tile of layer 1, expert 1 lies here"));
  change_bytes(packed.path_of(a), a.offset, tile.data(), tile.size());
  EXPECT_THAT(problems(store()), ElementsAre(HasSubstr("a tile of layer 1, expert 1 lies here")));
}

TEST_F(Formats, a_tile_of_another_store_is_refused_by_its_mark) {
  ModelMaker(TinyModel{}).write(model());
  pack(int4_of(), {}, model());
  pack_store(model(), folder_ / "other", options(int4_of(), as(WeightKind::nf4)));
  const Store one = Store::open(store()), other = Store::open(folder_ / "other");
  const UnitId id{UnitKind::expert, 1, 0};
  const StoredUnit &a = *one.layout().find(id), &b = *other.layout().find(id);
  const std::string file = read_text(other.path_of(b));
  EXPECT_THAT(
      error_of(
          [&] { one.check_header(a, reinterpret_cast<const std::byte*>(file.data()) + b.offset); },
          folder_),
      HasSubstr("a tile of another store lies here"));
}

TEST_F(Formats, verifying_against_another_model_finds_every_tile) {
  ModelMaker(TinyModel{}).write(model());
  TinyModel other;
  other.seed = 2;
  ModelMaker(other).write(folder_ / "other");
  pack(as(WeightKind::fp8), as(WeightKind::fp8), model());
  EXPECT_EQ(problems(store(), folder_ / "other").size(),
            Store::open(store()).layout().units.size());
}

TEST_F(Formats, errors_are_told_layer_by_layer) {
  ModelMaker(TinyModel{}).write(model());
  PackOptions asked = options(int4_of(32), as(WeightKind::nf4));
  std::vector<LayerError> told;
  asked.progress = [&](const PackProgress& at) {
    told.insert(told.end(), at.finished.begin(), at.finished.end());
  };
  const PackReport report = pack_store(model(), store(), asked);
  ASSERT_EQ(report.errors.size(), 3U);  // the rest of layers 0 and 1, the experts of layer 1
  EXPECT_EQ(told.size(), report.errors.size());
  for (const LayerError& error : report.errors) {
    EXPECT_GT(error.relative(), 0.01);
    EXPECT_LT(error.relative(), 0.2);
    EXPECT_EQ(error.absmax_squared_error > error.squared_error, error.experts);
  }
}

}  // namespace
}  // namespace tailor::testing_support
