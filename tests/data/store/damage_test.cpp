// Whatever happens to a store's bytes, it is found, and nothing crashes.

#include <random>

#include "tests/data/store/store_fixture.h"

namespace tailor::testing_support {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class Damage : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    TinyModel tiny;
    tiny.experts = 2;
    ModelMaker(tiny).write(model());
    pack_store(model(), store(), options(int4_of(), as(WeightKind::fp8)));
  }
  /// Reads, changes, writes back.
  template <class Change>
  void change(const fs::path& path, const Change& change) {
    std::string text = read_text(path);
    change(text);
    FileWriter writer(path);
    writer.write(text);
    writer.close();
  }
};

TEST_F(Damage, every_bit_of_every_header_is_checked_without_a_hash) {
  const Store packed = Store::open(store());
  std::int64_t missed = 0, bits = 0;
  for (const StoredUnit& unit : packed.layout().units) {
    const std::string file = read_text(packed.path_of(unit));
    std::vector<std::byte> header(static_cast<std::size_t>(kUnitHeaderBytes));
    std::memcpy(header.data(), file.data() + unit.offset, header.size());
    EXPECT_NO_THROW(packed.check_header(unit, header.data()));
    for (std::size_t byte = 0; byte < header.size(); ++byte) {
      for (unsigned bit = 0; bit < 8; ++bit, ++bits) {
        header[byte] ^= static_cast<std::byte>(1U << bit);
        try {
          packed.check_header(unit, header.data());
          ++missed;
        } catch (const Error&) {
        }
        header[byte] ^= static_cast<std::byte>(1U << bit);
      }
    }
  }
  EXPECT_EQ(missed, 0) << "of " << bits;
  EXPECT_GT(bits, 32768 * 8);
}

TEST_F(Damage, every_bit_of_a_header_is_found_by_verify) {
  const Store packed = Store::open(store());
  const StoredUnit& unit = *packed.layout().find({UnitKind::expert, 1, 0});
  std::vector<std::byte> bytes(static_cast<std::size_t>(unit.bytes));
  const std::string file = read_text(packed.path_of(unit));
  std::memcpy(bytes.data(), file.data() + unit.offset, bytes.size());
  for (std::size_t byte = 0; byte < static_cast<std::size_t>(kUnitHeaderBytes); ++byte) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      bytes[byte] ^= static_cast<std::byte>(1U << bit);
      ASSERT_THROW(packed.check_hash(unit, bytes.data()), Error) << byte << " " << bit;
      bytes[byte] ^= static_cast<std::byte>(1U << bit);
    }
  }
  EXPECT_NO_THROW(packed.check_hash(unit, bytes.data()));
  // And through the whole of verify for some of them.
  for (std::size_t byte = 0; byte < 300; byte += 13) {
    change(packed.path_of(unit),
           [&](std::string& text) { text[static_cast<std::size_t>(unit.offset) + byte] ^= 1; });
    EXPECT_THAT(problems(store()), ElementsAre(HasSubstr("layer 1, expert 0: "))) << byte;
    change(packed.path_of(unit),
           [&](std::string& text) { text[static_cast<std::size_t>(unit.offset) + byte] ^= 1; });
  }
  EXPECT_THAT(problems(store()), IsEmpty());
}

TEST_F(Damage, two_thousand_random_bits_are_found_in_the_tile_they_are_in) {
  const Store packed = Store::open(store());
  std::map<std::string, std::string> files;
  for (const auto& file : packed.layout().files) files[file.name] = read_text(store() / file.name);
  std::mt19937_64 random(7);
  for (int i = 0; i < 2000; ++i) {
    const StoredUnit& unit = packed.layout().units[random() % packed.layout().units.size()];
    std::string& file = files[packed.layout().files[static_cast<std::size_t>(unit.file)].name];
    const auto at =
        static_cast<std::size_t>(unit.offset) + random() % static_cast<std::uint64_t>(unit.bytes);
    const auto bit = static_cast<char>(1U << random() % 8);
    file[at] = static_cast<char>(file[at] ^ bit);
    for (const StoredUnit& each : packed.layout().units) {
      if (each.file != unit.file) continue;
      const auto* bytes = reinterpret_cast<const std::byte*>(file.data()) + each.offset;
      if (each == unit) {
        ASSERT_THROW(packed.check_hash(each, bytes), Error) << i;
      } else {
        ASSERT_NO_THROW(packed.check_hash(each, bytes)) << i;
      }
    }
    if (i % 50 == 0) {
      change(packed.path_of(unit), [&](std::string& text) { text = file; });
      const auto found = problems(store());
      ASSERT_EQ(found.size(), 1U) << i;
      EXPECT_THAT(found[0], HasSubstr(unit_text(unit.id)));
      file[at] = static_cast<char>(file[at] ^ bit);
      change(packed.path_of(unit), [&](std::string& text) { text = file; });
    } else {
      file[at] = static_cast<char>(file[at] ^ bit);
    }
  }
  EXPECT_THAT(problems(store()), IsEmpty());
}

TEST_F(Damage, files_of_another_length_do_not_open) {
  const Store packed = Store::open(store());
  for (const auto& file : packed.layout().files) {
    const fs::path path = store() / file.name;
    const std::string whole = read_text(path);
    for (const std::int64_t length :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{4095}, std::int64_t{4096}, file.bytes / 2,
          file.bytes - 4096, file.bytes - 1, file.bytes + 1}) {
      fs::resize_file(path, static_cast<std::uintmax_t>(length));
      EXPECT_THAT(error_of([&] { Store::open(store()); }, folder_),
                  testing::AllOf(HasSubstr("a file of the store has"), HasSubstr(file.name)));
    }
    write_atomically(path, whole);
    fs::remove(path);
    EXPECT_THAT(error_of([&] { Store::open(store()); }, folder_),
                testing::AllOf(HasSubstr("a file of the store is missing"), HasSubstr(file.name)));
    fs::create_directory(path);
    EXPECT_THROW(Store::open(store()), Error);
    fs::remove(path);
    write_atomically(path, whole);
  }
  EXPECT_THAT(problems(store()), IsEmpty());
}

TEST_F(Damage, a_file_that_is_cut_while_it_is_verified_is_a_line_of_the_report) {
  const Store packed = Store::open(store());
  fs::resize_file(store() / "layers/00001.tiles", 4096);
  const VerifyReport report = verify_store(packed, {});
  ASSERT_FALSE(report.problems.empty());
  EXPECT_THAT(report.problems[0], HasSubstr("the file ends inside a tile"));
}

TEST_F(Damage, the_manifest_is_read_as_it_was_written_or_not_at_all) {
  const std::string whole = read_text(store() / kManifestName);
  EXPECT_EQ(whole, Json::parse(whole).dump() + "\n");
  for (std::size_t length = 0; length < whole.size(); length += 7) {
    write_atomically(store() / kManifestName, whole.substr(0, length));
    ASSERT_THROW(Store::open(store()), Error) << length;
  }
  // The same JSON in another dress.
  write_atomically(store() / kManifestName, Json::parse(whole).dump(1) + "\n");
  EXPECT_THROW(Store::open(store()), Error);
  write_atomically(store() / kManifestName, whole);
  EXPECT_NO_THROW(Store::open(store()));
}

/// Every number changed, with and without a digest made to fit: config.json and the mark tell too.
TEST_F(Damage, edited_numbers_of_the_manifest_are_refused) {
  const fs::path path = store() / kManifestName;
  const Json whole = read_json(path);
  int edits = 0;
  const std::function<void(Json&, const std::function<void()>&)> each_number = [&](Json& json,
                                                                                   const std::
                                                                                       function<
                                                                                           void()>&
                                                                                           look) {
    if (json.is_number()) {
      const Json old = json;
      for (const std::int64_t other :
           {std::int64_t{0}, std::int64_t{1}, std::int64_t{-1}, std::int64_t{4096},
            old.get<std::int64_t>() + 1, old.get<std::int64_t>() * 2, std::int64_t{1} << 31,
            std::int64_t{1} << 50, INT64_MAX}) {
        if (other == old.get<std::int64_t>()) continue;
        json = other;
        look();
      }
      for (const Json& other : {Json(1.5), Json("1"), Json(nullptr), Json(true), Json::array()}) {
        json = other;
        look();
      }
      json = old;
      return;
    }
    if (!json.is_structured()) return;
    for (Json& part : json) each_number(part, look);
  };
  Json edited = whole;
  each_number(edited, [&] {
    ++edits;
    Json fitting = edited;
    fitting.erase("digest");
    const std::string text = fitting.dump();
    fitting["digest"] = hash_text(hash_unit(reinterpret_cast<const std::byte*>(text.data()),
                                            static_cast<std::int64_t>(text.size())));
    for (const Json& json : {edited, fitting}) {
      // What the source was published as stands for itself: nothing else in the store tells it.
      if (json == fitting && json["source_forms"] != whole["source_forms"]) continue;
      FileWriter writer(path);
      writer.write(json.dump() + "\n");
      writer.flush();
      ASSERT_THROW(Store::open(store()), Error) << json.dump().substr(0, 2000);
    }
  });
  EXPECT_GT(edits, 1000);
}

TEST_F(Damage, a_store_of_another_config_is_refused) {
  change(store() / "config.json", [](std::string& text) { text += "\n"; });
  EXPECT_THAT(error_of([&] { Store::open(store()); }, folder_),
              HasSubstr("manifest and config.json do not belong together"));
  Json config = read_json(store() / "config.json");
  config["num_local_experts"] = 3;
  write_atomically(store() / "config.json", config.dump());
  EXPECT_THAT(error_of([&] { Store::open(store()); }, folder_),
              HasSubstr("are not those of its config.json"));
  fs::remove(store() / "config.json");
  EXPECT_THAT(error_of([&] { Store::open(store()); }, folder_),
              HasSubstr("config.json is missing"));
}

TEST_F(Damage, twenty_thousand_random_changes_of_the_manifest_are_all_refused) {
  const fs::path path = store() / kManifestName;
  const std::string whole = read_text(path);
  std::mt19937_64 random(11);
  std::int64_t accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text = whole;
    const std::size_t changes = 1 + random() % 3;
    for (std::size_t k = 0; k < changes; ++k) {
      const std::size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text[at] = "0123456789,[]{}\":-e."[random() % 20];
          break;
        case 2:
          text.erase(at, 1 + random() % 8);
          break;
        default:
          text.insert(at, text.substr(random() % text.size(), 1 + random() % 8));
      }
    }
    if (text == whole) continue;
    FileWriter writer(path);
    writer.write(text);
    writer.flush();
    try {
      Store::open(store());
      ++accepted;
    } catch (const Error&) {
    }
  }
  EXPECT_EQ(accepted, 0);
}

/// Past the digest, as a hostile file would be: the parts are checked on their own.
TEST_F(Damage, hostile_manifests_with_fitting_digests_do_not_crash) {
  const Json whole = read_json(store() / kManifestName);
  std::mt19937_64 random(13);
  std::int64_t parsed = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text = whole.dump();
    for (std::size_t k = 0; k < 1 + random() % 2; ++k) {
      text[random() % text.size()] = "0123456789,[]\"-"[random() % 15];
    }
    Json json = Json::parse(text, nullptr, false);
    if (!json.is_object()) continue;
    ++parsed;
    json.erase("digest");
    const std::string members = json.dump();
    json["digest"] = hash_text(hash_unit(reinterpret_cast<const std::byte*>(members.data()),
                                         static_cast<std::int64_t>(members.size())));
    try {
      read_manifest(json, "manifest");
    } catch (const Error&) {
    }
  }
  EXPECT_GT(parsed, 2000);
}

TEST_F(Damage, random_headers_do_not_crash) {
  std::mt19937_64 random(17);
  const Store packed = Store::open(store());
  const StoredUnit& unit = packed.layout().units.front();
  std::vector<std::byte> header(static_cast<std::size_t>(kUnitHeaderBytes));
  write_unit_header({unit.id, packed.mark(), unit.bytes, unit.matrices}, header);
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> spoilt = header;
    for (std::size_t k = 0; k < 1 + random() % 4; ++k) {
      spoilt[random() % 256] = static_cast<std::byte>(random());
    }
    try {
      read_unit_header(spoilt, "header");
    } catch (const Error&) {
    }
  }
  EXPECT_THROW(read_unit_header(std::span(header).first(100), "header"), Error);
}

TEST_F(Damage, a_folder_that_is_no_store_says_so) {
  EXPECT_FALSE(Store::is_store(model()));
  EXPECT_TRUE(Store::is_store(store()));
  EXPECT_THAT(error_of([&] { Store::open(model()); }, folder_),
              HasSubstr("this folder is not a store"));
  fs::rename(store() / kManifestName, store() / kJournalName);
  EXPECT_THAT(error_of([&] { Store::open(store()); }, folder_),
              HasSubstr("this store is not finished"));
}

}  // namespace
}  // namespace tailor::testing_support
