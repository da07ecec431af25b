// Several ranks that were started wrongly, or of which one dies: what the program says and does.
// The long suite (slow/) has every phase.

#include "tests/e2e/rank_deaths.h"

namespace tailor {
namespace {

using namespace testing_support;
using ::testing::AllOf;
using ::testing::HasSubstr;

TEST_F(RankDeaths, the_others_leave_and_the_next_attempt_goes_on_to_the_bit) {
  survived({death_in("load", "KILL", 1), death_in("collective", "KILL", 0),
            death_in("save", "KILL", 1), death_in("step", "STOP", 1)});
}

/// Two ranks whose machines differ: each in a folder of its own, where relative paths start.
class RanksDisagree : public RanksProgram {
 protected:
  void SetUp() override {
    RanksProgram::SetUp();
    for (const char* host : {"host0", "host1"}) {
      make_folders(work_ / host);
      fs::copy(kModel, work_ / host / "model", fs::copy_options::recursive);
      fs::copy(work_ / "rows.jsonl", work_ / host / "rows.jsonl");
    }
  }
  std::vector<std::string> words(const std::string& folder,
                                 const std::vector<std::string>& more = {}) const {
    std::vector<std::string> out = {"base_model=model", "data.train=[rows.jsonl]"};
    out.insert(out.end(), more.begin(), more.end());
    return train(folder, 2, out);
  }
  void start(Group& group, const std::string& folder,
             const std::vector<std::string>& more_of_1 = {}) const {
    for (int r = 0; r < 2; ++r) {
      const fs::path host = work_ / ("host" + std::to_string(r));
      start_rank(group, r, 2, words(folder, r == 1 ? more_of_1 : std::vector<std::string>{}),
                 {{"TAILOR_CACHE", (host / "cache").string()}},
                 {"/bin/sh", "-c", "cd \"$0\" && exec \"$@\"", host.string()});
    }
  }
  static void expect_refused(Group& group, const std::string& what) {
    ASSERT_TRUE(group.wait(60)) << group.processes.outputs();
    for (int r = 0; r < 2; ++r) {
      EXPECT_EQ(group.processes.exit_code(r), 2) << group.processes.outputs();
      EXPECT_THAT(group.processes.output(r),
                  AllOf(HasSubstr("error: ranks 0 and 1 do not agree on " + what),
                        HasSubstr("rank 0: "), HasSubstr("rank 1: ")));
    }
  }
};

TEST_F(RanksDisagree, on_the_recipe_the_data_or_the_model) {
  Group recipe, data, model, experts, agree;
  start(agree, "agree");
  ASSERT_TRUE(agree.wait(60)) << agree.processes.outputs();
  for (int r = 0; r < 2; ++r)
    EXPECT_EQ(agree.processes.exit_code(r), 0) << agree.processes.outputs();
  start(recipe, "recipe", {"training.learning_rate=1.0e-3"});
  expect_refused(recipe, "the recipe's training.learning_rate\n");
  EXPECT_THAT(recipe.processes.output(0),
              AllOf(HasSubstr("rank 0: 0.005"), HasSubstr("rank 1: 0.001")));
  EXPECT_FALSE(fs::exists(work_ / "recipe"));

  std::ofstream(work_ / "host1/rows.jsonl", std::ios::app) << "{\"input_ids\": [1, 2, 3]}\n";
  start(data, "data");
  expect_refused(data, "the training data\n");
  fs::copy(work_ / "rows.jsonl", work_ / "host1/rows.jsonl", fs::copy_options::overwrite_existing);

  // What the fingerprint of a checkpoint does not see, the packed tiles' hashes do.
  flip_bit(work_ / "host1/model", "model.layers.1.feed_forward.experts.gate_up_proj", 5000);
  start(experts, "experts");
  expect_refused(experts, "the base model's packed weights\n");
  flip_bit(work_ / "host1/model", "model.layers.0.self_attn.q_proj.weight", 0);
  start(model, "model");
  expect_refused(model, "the base model\n");
}

TEST_F(RanksProgram, one_rank_with_less_memory_ends_all_with_its_name) {
  const auto root = [](const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  };
  if (!root("unshare --mount true")) GTEST_SKIP() << "no right to make a mount namespace";
  // What this machine says of itself, but for 1 MiB of memory.
  std::string info;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    info += (line.starts_with("MemAvailable:") ? "MemAvailable:    1024 kB" : line) + "\n";
  }
  write_atomically(work_ / "meminfo", info);
  Group group;
  start_rank(group, 0, 2, train("run", 2));
  start_rank(group, 1, 2, train("run", 2), {},
             {"/usr/bin/unshare", "--mount", "/bin/sh", "-c",
              "mount --bind \"$0\" /proc/meminfo && exec \"$@\"", (work_ / "meminfo").string()});
  ASSERT_TRUE(group.wait(60)) << group.processes.outputs();
  for (int r = 0; r < 2; ++r)
    EXPECT_EQ(group.processes.exit_code(r), 66) << group.processes.outputs();
  EXPECT_THAT(group.processes.output(0), HasSubstr("error: rank 1 failed planning: "));
  EXPECT_FALSE(fs::exists(work_ / "run"));
}

TEST_F(RanksProgram, variables_with_which_ranks_cannot_talk_are_refused) {
  const std::vector<std::tuple<std::string, std::string, std::string>> cases = {
      {"TAILOR_RANK_BACKEND", "nccl",
       "backend nccl moves device memory, and this run computes on the CPU"},
      {"TAILOR_RANK_BACKEND", "mpi", "backend 'mpi' is not known"},
      {"TAILOR_RANK_TIMEOUT", "soon", "TAILOR_RANK_TIMEOUT='soon' is not a number above 0"},
      {"TAILOR_COLLECTIVE_TIMEOUT", "0", "TAILOR_COLLECTIVE_TIMEOUT='0' is not a number above 0"}};
  std::vector<std::unique_ptr<Group>> groups;
  for (const auto& [name, value, said] : cases) {
    groups.push_back(std::make_unique<Group>());
    start_rank(*groups.back(), 0, 2, train("run", 2), {{name, value}});
  }
  for (std::size_t i = 0; i < cases.size(); ++i) {
    ASSERT_TRUE(groups[i]->wait(60)) << groups[i]->processes.outputs();
    EXPECT_EQ(groups[i]->processes.exit_code(0), 2);
    EXPECT_THAT(groups[i]->processes.output(0), HasSubstr("error: " + std::get<2>(cases[i])));
  }
  EXPECT_FALSE(fs::exists(work_ / "run"));
}

TEST_F(RanksProgram, a_port_in_use_is_named) {
  Group group;
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(group.port));
  ASSERT_EQ(bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(socket, 1), 0);
  start_rank(group, 0, 2, train("run", 2));
  ASSERT_TRUE(group.wait(60)) << group.processes.outputs();
  EXPECT_EQ(group.processes.exit_code(0), 69);
  EXPECT_THAT(group.processes.output(0),
              AllOf(HasSubstr("error: rank 0 cannot open the meeting point: port " +
                              std::to_string(group.port) + " is in use"),
                    HasSubstr("Set MASTER_PORT to a free port")));
  ::close(socket);
}

}  // namespace
}  // namespace tailor
