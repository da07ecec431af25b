// `tailor plan --probe` as a user runs it, on a tiny model: what it measures, keeps and refuses.

#include <gmock/gmock.h>

#include "tests/e2e/train_program.h"

namespace tailor {
namespace {

using namespace testing_support;
using testing::HasSubstr;
using testing::Not;

class Probe : public TrainProgram {
 protected:
  /// seconds_per_step of `tailor plan`, and its working.
  Json step_of(const std::vector<std::string>& words) {
    std::vector<std::string> all = {"plan", recipe(), "--json"};
    all.insert(all.end(), words.begin(), words.end());
    const Finished done = run(all);
    EXPECT_EQ(done.code, 0) << done.err;
    err_ = done.err;
    return done.code == 0 ? parse_json(done.out, "stdout").at("seconds_per_step") : Json();
  }
  std::vector<fs::path> kept() const {
    std::vector<fs::path> out;
    for (const auto& entry : fs::directory_iterator(work_ / "cache/steps"))
      out.push_back(entry.path());
    return out;
  }
  std::string err_;
};

TEST_F(Probe, measures_once_and_later_plans_and_the_run_itself_know_it) {
  // What a killed measurement left behind, of a process that cannot be.
  make_folders(work_ / "cache/steps/.measuring.4194305/store");
  const Json probed = step_of({"--probe"});
  const std::string working = probed.at("working");
  EXPECT_GT(probed.at("value").get<double>(), 0);
  EXPECT_THAT(working, HasSubstr(" layers measured on this machine on "));
  EXPECT_THAT(working, HasSubstr(" mixture x ("));
  ASSERT_EQ(kept().size(), 1U);  // and no weights are left behind
  // The same step again, to the last digit, without measuring.
  EXPECT_EQ(step_of({}), probed);
  EXPECT_EQ(step_of({"training.learning_rate=1.0e-4", "seed=7"}), probed);
  const Finished trained = run({"train", recipe()});
  ASSERT_EQ(trained.code, 0) << trained.err;
  EXPECT_EQ(read_json(work_ / "run/plan.json").at("seconds_per_step"), probed);
  // Another step is not known.
  for (const char* other : {"lora.rank=8", "training.micro_batch_size=1", "compute.dtype=float32",
                            "base.format=int4", "data.sequence_len=48"}) {
    EXPECT_THAT(step_of({other}).at("working").get<std::string>(),
                Not(HasSubstr("layers measured")))
        << other;
  }
  // A damaged file is left aside, and the next probe writes it anew.
  write_atomically(kept().front(), "{}");
  EXPECT_THAT(step_of({}).at("working").get<std::string>(), Not(HasSubstr("layers measured")));
  EXPECT_THAT(err_, HasSubstr("leaving "));
  EXPECT_THAT(step_of({"--probe"}).at("working").get<std::string>(), HasSubstr("layers measured"));
  EXPECT_EQ(kept().size(), 1U);
}

TEST_F(Probe, reads_from_disk_where_the_run_would) {
  const Json probed =
      step_of({"--probe", "base.format=int4", "base.device_memory=0", "base.host_memory=0"});
  EXPECT_THAT(probed.at("working").get<std::string>(),
              HasSubstr("measured, for reading beside computing"));
  const Json measured = read_json(kept().front());
  EXPECT_GT(measured.at("stream").at("passes_seconds").get<double>(), 0);
  EXPECT_GT(measured.at("disk_bytes_per_second").get<double>(), 0);
}

TEST_F(Probe, of_steps_that_are_recomputed_and_paged_takes_them_so) {
  const Json probed = step_of({"--probe", "compute.keep_activations=none", "lora.expert_state=disk",
                               "base.activations=disk"});
  EXPECT_THAT(probed.at("working").get<std::string>(), HasSubstr("layers measured"));
  EXPECT_EQ(kept().size(), 1U);
}

TEST_F(Probe, says_what_it_lacks) {
  // No room for what is measured: the cache lies below a file.
  write_atomically(work_ / "cache", "");
  Finished done = run({"plan", recipe(), "--probe", "--data"});
  EXPECT_NE(done.code, 0);
  EXPECT_THAT(done.err, HasSubstr("cache"));
  fs::remove(work_ / "cache");
  // Without tailor-compute beside it.
  make_folders(work_ / "bin");
  fs::copy_file(TAILOR_BIN_DIR "/tailor", work_ / "bin/tailor");
  const std::string out = (work_ / "lone.txt").string();
  const std::string command =
      "cd " TAILOR_SOURCE_DIR " && TAILOR_CACHE=" + (work_ / "cache").string() + " " +
      (work_ / "bin/tailor").string() + " plan " + recipe() + " --probe > " + out + " 2>&1";
  const int status = std::system(command.c_str());
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 2) << read_text(out);
  EXPECT_THAT(read_text(out), HasSubstr("error: the program tailor-compute is not installed"));
  // A recipe that does not fit is not measured, but planned as ever.
  done = run({"plan", recipe(), "--probe", "training.micro_batch_size=65536",
              "training.gradient_accumulation_steps=65536"});
  EXPECT_EQ(done.code, 66) << done.err;
  EXPECT_THAT(done.err, Not(HasSubstr("measuring steps of")));
}

}  // namespace
}  // namespace tailor
