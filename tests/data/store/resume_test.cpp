// A packing that was killed, interrupted or refused goes on, and ends with the same bytes.

#include <sys/file.h>

#include "data/store/journal.h"
#include "tests/data/store/kills.h"

namespace tailor::testing_support {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;

class Resume : public StoreTest {
 protected:
  void SetUp() override {
    StoreTest::SetUp();
    ModelMaker(many_units()).write(model());
  }
  static PackOptions int4() { return options(int4_of(), as(WeightKind::nf4)); }
  fs::path whole() {
    if (!fs::exists(folder_ / "whole")) pack_store(model(), folder_ / "whole", int4());
    return folder_ / "whole";
  }
  /// A store that was interrupted some way in.
  void begin() {
    for (int attempt = 0; attempt < 20; ++attempt) {
      fs::remove_all(store());
      PackOptions asked = int4();
      asked.threads = 1;
      int polls = 0;  // at least one a unit, while the machine keeps up
      asked.stop = [&] { return ++polls > 10; };
      try {
        pack_store(model(), store(), asked);
      } catch (const Error& error) {
        EXPECT_EQ(error.fault(), Fault::stopped) << to_text(error);
        EXPECT_THAT(to_text(error), HasSubstr("interrupted while packing"));
        EXPECT_FALSE(fs::exists(store() / kManifestName));
        if (units_in_journal(store()) >= 3) return;
      }
    }
    FAIL() << "never interrupted in between";
  }
};

TEST_F(Resume, killed_at_random_instants_and_gone_on_with) {
  const KillReport report = pack_under_fire(model(), store(), whole(), int4(), 25, 5);
  EXPECT_EQ(report.kills, 25);
  EXPECT_GE(report.resumed, 5) << "too few met a begun journal to say anything";
  RecordProperty("resumed", report.resumed);
}

TEST_F(Resume, interrupted_and_gone_on_with) {
  begin();
  const std::int64_t kept = units_in_journal(store());
  const PackReport report = pack_store(model(), store(), int4());
  EXPECT_EQ(report.units_before, kept);
  EXPECT_THAT(differing_files(store(), whole()), IsEmpty());
}

TEST_F(Resume, the_report_of_errors_is_that_of_one_go) {
  begin();
  const PackReport resumed = pack_store(model(), store(), int4());
  const PackReport at_once = pack_store(model(), folder_ / "at_once", int4());
  ASSERT_EQ(resumed.errors.size(), at_once.errors.size());
  for (std::size_t i = 0; i < resumed.errors.size(); ++i) {
    EXPECT_EQ(resumed.errors[i].layer, at_once.errors[i].layer);
    EXPECT_NEAR(resumed.errors[i].relative(), at_once.errors[i].relative(), 1e-12);
    EXPECT_NEAR(resumed.errors[i].absmax_squared_error, at_once.errors[i].absmax_squared_error,
                1e-9 * at_once.errors[i].absmax_squared_error);
  }
}

TEST_F(Resume, with_a_journal_cut_off_anywhere) {
  begin();
  const std::string journal = read_text(store() / kJournalName);
  const std::size_t header = journal.find('\n') + 1;
  fs::copy(store(), folder_ / "begun", fs::copy_options::recursive);
  for (const std::size_t length : {std::size_t{0}, std::size_t{1}, header - 1, header, header + 10,
                                   journal.size() / 2, journal.size() - 1}) {
    fs::remove_all(store());
    fs::copy(folder_ / "begun", store(), fs::copy_options::recursive);
    fs::resize_file(store() / kJournalName, length);
    const auto lines =
        std::count(journal.begin(), journal.begin() + static_cast<std::ptrdiff_t>(length), '\n');
    const PackReport report = pack_store(model(), store(), int4());
    EXPECT_LE(report.units_before, std::max<std::int64_t>(0, lines - 1));
    EXPECT_THAT(differing_files(store(), whole()), IsEmpty()) << length;
  }
}

TEST_F(Resume, with_lines_of_zeros_in_the_journal) {
  begin();
  std::string journal = read_text(store() / kJournalName);
  const std::size_t header = journal.find('\n') + 1, line = journal.find('\n', header) + 1;
  std::fill(journal.begin() + static_cast<std::ptrdiff_t>(header),
            journal.begin() + static_cast<std::ptrdiff_t>(line - 1), '\0');
  write_atomically(store() / kJournalName, journal + "not JSON\n{\"layer\": 0}\n[]\n");
  pack_store(model(), store(), int4());
  EXPECT_THAT(differing_files(store(), whole()), IsEmpty());
}

TEST_F(Resume, with_a_damaged_header_of_the_journal_is_refused) {
  begin();
  std::string journal = read_text(store() / kJournalName);
  journal[3] = 'x';
  write_atomically(store() / kJournalName, journal);
  EXPECT_THAT(error_of([&] { pack_store(model(), store(), int4()); }, folder_),
              HasSubstr("the journal of this begun store is damaged"));
}

TEST_F(Resume, with_other_formats_or_another_model_is_refused_and_nothing_changed) {
  begin();
  // A cut-off last line would be dropped by those whose store it is.
  FileWriter(store() / kJournalName, true).write("{\"kind\": 6, \"lay");
  const auto before = files_of(store());
  const auto refused = [&](const PackOptions& asked, const fs::path& from) {
    const std::string error =
        error_of([&] { pack_store(from, store(), asked); }, folder_, Fault::usage);
    EXPECT_THAT(error, HasSubstr("a store of another model or with other formats is there"));
    EXPECT_TRUE(files_of(store()) == before);
  };
  refused(options(int4_of(64), as(WeightKind::nf4)), model());
  refused(options(int4_of(), as(WeightKind::fp8)), model());
  refused(options(), model());
  TinyModel larger = many_units();
  larger.experts = 17;
  ModelMaker(larger).write(folder_ / "larger");
  refused(int4(), folder_ / "larger");
  TinyModel other = many_units();  // of the same shape
  other.seed = 9;
  ModelMaker(other).write(folder_ / "other");
  EXPECT_THAT(
      error_of([&] { pack_store(folder_ / "other", store(), int4()); }, folder_, Fault::usage),
      HasSubstr("a store of another model"));
  pack_store(model(), store(), int4());
  EXPECT_THAT(differing_files(store(), whole()), IsEmpty());
}

TEST_F(Resume, while_another_process_packs_is_refused) {
  make_folders(store());
  const int descriptor = ::open((store() / kJournalName).c_str(), O_RDWR | O_CREAT, 0644);
  ASSERT_EQ(::flock(descriptor, LOCK_EX), 0);
  EXPECT_THAT(
      error_of([&] { pack_store(model(), store(), int4()); }, folder_, Fault::usage),
      AllOf(HasSubstr("another process is packing into this store"), HasSubstr("DIR/store")));
  ::close(descriptor);
  pack_store(model(), store(), int4());
  EXPECT_THAT(differing_files(store(), whole()), IsEmpty());
}

TEST_F(Resume, two_processes_at_once_make_one_store) {
  PackProcess one(model(), store(), int4()), other(model(), store(), int4());
  const int first = one.wait(), second = other.wait();
  EXPECT_TRUE(first == 0 || second == 0);
  EXPECT_TRUE(first == 0 || first == 2) << first;
  EXPECT_TRUE(second == 0 || second == 2) << second;
  EXPECT_THAT(differing_files(store(), whole()), IsEmpty());
}

TEST_F(Resume, into_a_folder_of_something_else_is_refused_and_nothing_changed) {
  make_folders(store() / "photos");
  write_atomically(store() / "photos/a.jpg", "x");
  const auto before = files_of(store());
  EXPECT_THAT(error_of([&] { pack_store(model(), store(), int4()); }, folder_, Fault::usage),
              HasSubstr("the folder is not empty and not a store"));
  EXPECT_TRUE(files_of(store()) == before);
  EXPECT_THAT(error_of([&] { pack_store(model(), model(), int4()); }, folder_, Fault::usage),
              HasSubstr("the folder is not empty and not a store"));
}

TEST_F(Resume, of_a_whole_store_says_so_and_changes_nothing) {
  whole();
  const auto before = files_of(whole());
  const PackReport report = pack_store(model(), whole(), int4());
  EXPECT_EQ(report.units_before, report.units);
  EXPECT_EQ(report.source_bytes_read, 0);
  EXPECT_EQ(report.bytes, Store::open(whole()).layout().bytes());
  EXPECT_TRUE(files_of(whole()) == before);
  for (const PackOptions& other :
       {options(int4_of(64), as(WeightKind::nf4)), options(), options(int4_of())}) {
    EXPECT_THAT(error_of([&] { pack_store(model(), whole(), other); }, folder_, Fault::usage),
                HasSubstr("a store of another model or with other formats is there"));
  }
  TinyModel other = many_units();
  other.seed = 9;
  ModelMaker(other).write(folder_ / "other");
  EXPECT_THAT(
      error_of([&] { pack_store(folder_ / "other", whole(), int4()); }, folder_, Fault::usage),
      HasSubstr("a store of another model"));
  EXPECT_TRUE(files_of(whole()) == before);
}

TEST_F(Resume, where_a_file_of_the_begun_store_is_gone_is_refused) {
  begin();
  fs::remove(store() / "layers/00000.tiles");
  EXPECT_THAT(error_of([&] { pack_store(model(), store(), int4()); }, folder_),
              AllOf(HasSubstr("a file of this begun store is missing or cut off"),
                    HasSubstr("layers/00000.tiles")));
}

TEST_F(Resume, after_a_crash_between_manifest_and_the_journal_s_end) {
  begin();
  const std::string journal = read_text(store() / kJournalName);
  pack_store(model(), store(), int4());
  write_atomically(store() / kJournalName, journal);
  EXPECT_NO_THROW(Store::open(store()));
  const PackReport report = pack_store(model(), store(), int4());
  EXPECT_EQ(report.units_before, report.units);
  EXPECT_THAT(differing_files(store(), whole()), IsEmpty());
}

TEST_F(Resume, the_journal_keeps_what_is_synced_and_no_more) {
  make_folders(store());
  PackJournal::Header header;
  header.forms.of_matrix = {WeightFormat::bf16(), WeightFormat::fp8_blocks()};
  const UnitId id{UnitKind::expert, 3, 17};
  PackedUnit unit;
  unit.hash[0] = std::byte{0xAB};
  unit.squared_error = 0.1;
  unit.squares = 2.0 / 3;
  {
    PackJournal journal(store(), header);
    journal.add(id, unit);
    journal.add({UnitKind::attention, 3, 0}, {{}, 0, 0, 0, "abc"});
    journal.sync();
    journal.add({UnitKind::expert, 3, 18}, unit);
  }
  EXPECT_EQ(PackJournal::begun(store())->forms, header.forms);
  PackJournal journal(store(), header);
  ASSERT_EQ(journal.units().size(), 2U);
  EXPECT_EQ(journal.units().at(id).hash, unit.hash);
  EXPECT_EQ(journal.units().at(id).squared_error, 0.1);
  EXPECT_EQ(journal.units().at(id).squares, 2.0 / 3);
  EXPECT_EQ(journal.units().at({UnitKind::attention, 3, 0}).sample, "abc");
}

}  // namespace
}  // namespace tailor::testing_support
