#include "data/runs/run_folder.h"

#include <sys/wait.h>

#include "base/json.h"
#include "tests/data/runs/runs_fixture.h"

namespace tailor {
namespace {

class RunFolderTest : public RunsTest {
 protected:
  fs::path path() const { return folder_ / "runs" / "demo"; }
  RunFolder take(bool resume) { return RunFolder::open(path(), resume, clock_); }
};

TEST_F(RunFolderTest, a_new_folder_gets_an_identifier_that_stays) {
  std::string run;
  {
    const RunFolder folder = take(false);
    run = folder.run();
    EXPECT_EQ(run.size(), 26U);
    EXPECT_FALSE(folder.resumed());
    EXPECT_EQ(folder.metrics(), path() / "metrics.jsonl");
  }
  EXPECT_EQ(RunFolder::run_in(path()), run);
  const RunFolder again = take(true);
  EXPECT_TRUE(again.resumed());
  EXPECT_EQ(again.run(), run);
}

TEST_F(RunFolderTest, resume_where_nothing_is_starts_afresh) {
  EXPECT_FALSE(take(true).resumed());
  fs::remove_all(path());
  make_folders(path());
  EXPECT_FALSE(take(false).resumed());
}

TEST_F(RunFolderTest, a_run_is_not_overwritten) {
  take(false);
  const Error error = error_of([&] { take(false); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_EQ(to_text(error),
            "error: output_dir holds a run already\n"
            "  where: " +
                path().string() +
                "\n"
                "  mend:  Go on with that run with --resume, or name another output_dir.\n");
}

TEST_F(RunFolderTest, folders_of_others_are_never_touched) {
  make_folders(path());
  write_atomically(path() / "thesis.tex", "years of work");
  for (const bool resume : {false, true}) {
    EXPECT_EQ(error_of([&] { take(resume); }).fault(), Fault::usage);
    EXPECT_EQ(std::distance(fs::directory_iterator(path()), {}), 1);
  }
  write_atomically(path() / "run.json", R"({"format": "another program's"})");
  EXPECT_EQ(error_of([&] { take(true); }).fault(), Fault::usage);
  EXPECT_EQ(std::distance(fs::directory_iterator(path()), {}), 2);
  write_atomically(path() / "run.json", "{cut off");
  EXPECT_EQ(error_of([&] { take(true); }).fault(), Fault::bad_file);
}

TEST_F(RunFolderTest, a_file_in_its_place_is_refused) {
  make_folders(path().parent_path());
  write_atomically(path(), "file");
  EXPECT_EQ(error_of([&] { take(true); }).fault(), Fault::usage);
  EXPECT_EQ(error_of([&] { RunFolder::open(path() / "below", false, clock_); }).fault(), Fault::io);
}

TEST_F(RunFolderTest, newer_folders_are_refused) {
  make_folders(path());
  write_atomically(path() / "run.json", R"({"format": "tailor run", "version": 2, "run": "X"})");
  EXPECT_EQ(error_of([&] { take(true); }).fault(), Fault::usage);
}

TEST_F(RunFolderTest, keeps_the_chosen_experts_and_goes_on_with_those_alone) {
  const fs::path first = path().parent_path() / "first.yaml",
                 other = first.parent_path() / "b.yaml";
  make_folders(path().parent_path());
  write_atomically(first, "format: 1\n");
  write_atomically(other, "format: 1\n# edited\n");
  {
    const RunFolder folder = take(false);
    folder.keep_experts(first);
    EXPECT_EQ(read_text(folder.experts()), "format: 1\n");
    EXPECT_EQ(read_json(path() / "run.json").at("experts_sha256"), sha256_file(first));
    EXPECT_EQ(read_json(path() / "run.json").at("run"), folder.run());
  }
  const RunFolder again = take(true);
  again.keep_experts(first);
  again.keep_experts(again.experts());  // its own copy
  const Error error = error_of([&] { again.keep_experts(other); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_EQ(
      to_text(error),
      "error: lora.experts is not the choice of experts that this run was started with: its "
      "SHA-256 is " +
          sha256_file(other).substr(0, 16) + "..., needed: " + sha256_file(first).substr(0, 16) +
          "...\n  where: " + other.string() +
          "\n  mend:  Go on with the run's own copy, lora.experts=" + again.experts().string() +
          ", or train the other choice into another output_dir.\n");
  EXPECT_EQ(read_text(again.experts()), "format: 1\n");
  // A copy that was edited is told, and made again from a file that fits.
  write_atomically(again.experts(), "format: 2\n");
  EXPECT_EQ(error_of([&] { again.keep_experts(again.experts()); }).fault(), Fault::usage);
  again.keep_experts(first);
  EXPECT_EQ(read_text(again.experts()), "format: 1\n");
}

TEST_F(RunFolderTest, one_process_at_a_time) {
  RunFolder held = take(false);
  const RunFolder moved = std::move(held);
  const Error error = error_of([&] { take(true); });
  EXPECT_EQ(error.fault(), Fault::usage);
  EXPECT_NE(error.parts().what.find("process " + std::to_string(::getpid()) + " on "),
            std::string::npos)
      << error.parts().what;
}

TEST_F(RunFolderTest, the_lock_of_a_killed_process_is_free) {
  const pid_t child = ::fork();
  if (child == 0) {
    const RunFolder held = take(false);
    ::raise(SIGKILL);
  }
  ::waitpid(child, nullptr, 0);
  EXPECT_TRUE(take(true).resumed());
}

TEST_F(RunFolderTest, a_folder_that_cannot_be_written_is_told_at_once) {
  // /proc refuses new folders even to root.
  const Error error = error_of([&] { RunFolder::open("/proc/tailor-run", false, clock_); });
  EXPECT_EQ(error.fault(), Fault::io);
  EXPECT_EQ(error.parts().where, "/proc/tailor-run");
}

}  // namespace
}  // namespace tailor
