#include "base/rank_env.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>

#include "base/json.h"
#include "trainer/ranks/rank_store.h"

namespace tailor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

using Variables = std::map<std::string, std::string>;

EnvLookup lookup(const Variables& variables) {
  return [&variables](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
}

const Variables kTorchrun = {
    {"RANK", "3"},          {"WORLD_SIZE", "8"},       {"LOCAL_RANK", "1"},
    {"MASTER_PORT", "123"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_ADDR", "gpu01"},
};
const Variables kSrun = {
    {"SLURM_JOB_ID", "123456"},
    {"SLURM_STEP_ID", "0"},
    {"SLURM_PROCID", "2"},
    {"SLURM_NTASKS", "5"},
    {"SLURM_STEP_NUM_TASKS", "4"},
    {"SLURM_LOCALID", "0"},
    {"SLURM_NODEID", "1"},
    {"SLURM_JOB_NODELIST", "gpu[03-05,9]"},
    {"SLURM_STEP_TASKS_PER_NODE", "2(x2)"},
    {"SLURM_RESTART_COUNT", "1"},
};

Variables with(Variables base, const Variables& more) {
  for (const auto& [name, value] : more) base[name] = value;
  return base;
}

TEST(RankEnv, nothing_is_said_where_no_variable_is_set) {
  EXPECT_FALSE(read_rank_env(lookup({})).has_value());
  // A batch script, and a step of one task, are no ranks.
  EXPECT_FALSE(read_rank_env(lookup({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}})).has_value());
  const Variables one = with(kSrun, {{"SLURM_STEP_NUM_TASKS", "1"}});
  EXPECT_FALSE(read_rank_env(lookup(one)).has_value());
  // Templates of launchers leave empty variables.
  EXPECT_FALSE(read_rank_env(lookup({{"RANK", ""}, {"WORLD_SIZE", ""}})).has_value());
}

TEST(RankEnv, torchrun) {
  const Variables all = with(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                         {"TORCHELASTIC_RESTART_COUNT", "2"},
                                         {"TORCHELASTIC_RUN_ID", "abc"}});
  const RankEnv env = read_rank_env(lookup(all)).value();
  EXPECT_EQ(env.rank, 3);
  EXPECT_EQ(env.world_size, 8);
  EXPECT_EQ(env.local_rank, 1);
  EXPECT_EQ(env.local_world_size, 2);
  EXPECT_EQ(env.master_addr, "gpu01");
  EXPECT_EQ(env.master_port, 123);
  EXPECT_TRUE(env.agent_store);
  EXPECT_EQ(env.job, "abc start 2");
  EXPECT_EQ(env.launcher.name, "torchrun");
  EXPECT_EQ(env.launcher.job_id, "abc");
  EXPECT_EQ(env.launcher.restart, 2);
  const RankEnv plain = read_rank_env(lookup(kTorchrun)).value();
  EXPECT_FALSE(plain.agent_store);
  EXPECT_EQ(plain.job, "");
  EXPECT_EQ(plain.launcher.name, "local");
}

TEST(RankEnv, srun_alone) {
  const RankEnv env = read_rank_env(lookup(kSrun)).value();
  EXPECT_EQ(env.rank, 2);
  EXPECT_EQ(env.world_size, 4);
  EXPECT_EQ(env.local_rank, 0);
  EXPECT_EQ(env.local_world_size, 2);
  EXPECT_EQ(env.master_addr, "gpu03");
  EXPECT_EQ(env.master_port, 20000 + (123456 * 8 + 1) % 12000);
  EXPECT_EQ(env.job, "123456 start 1");
  EXPECT_EQ(env.launcher.name, "slurm");
  EXPECT_EQ(env.launcher.restart, 1);
  // What a job script exports of torchrun's goes first.
  const Variables exported = with(kSrun, {{"MASTER_ADDR", "head"}, {"MASTER_PORT", "4000"}});
  EXPECT_EQ(read_rank_env(lookup(exported))->master_addr, "head");
  EXPECT_EQ(read_rank_env(lookup(exported))->master_port, 4000);
  const Variables under = with(kSrun, kTorchrun);
  EXPECT_EQ(read_rank_env(lookup(under))->rank, 3);
  EXPECT_EQ(read_rank_env(lookup(under))->launcher.name, "slurm");
}

TEST(RankEnv, kubernetes_indexed_job) {
  const Variables job = {{"JOB_COMPLETION_INDEX", "1"},
                         {"WORLD_SIZE", "2"},
                         {"MASTER_ADDR", "tune-0.tune"},
                         {"HOSTNAME", "tune-1"}};
  const RankEnv env = read_rank_env(lookup(job)).value();
  EXPECT_EQ(env.rank, 1);
  EXPECT_EQ(env.master_port, 29500);
  EXPECT_EQ(env.launcher.name, "kubernetes");
  EXPECT_EQ(env.launcher.job_id, "tune");
  EXPECT_EQ(read_launcher(lookup({{"SKYPILOT_TASK_ID", "sky-7"}, {"SLURM_JOB_ID", "1"}})).name,
            "skypilot");
}

TEST(RankEnv, our_own_job_files_say_who_launched) {
  const Variables own = with(kSrun, {{"TAILOR_LAUNCHER", "slurm"}, {"TAILOR_LAUNCHER_JOB", "9_1"}});
  EXPECT_EQ(read_launcher(lookup(own)).name, "slurm");
  EXPECT_EQ(read_launcher(lookup(own)).job_id, "9_1");
  EXPECT_EQ(read_launcher(lookup(own)).restart, 1);
  EXPECT_EQ(read_launcher(lookup(own)).allocated_unix_s, 0);
  const Launcher held = read_launcher(lookup(with(own, {{"TAILOR_ALLOCATED_AT", "1700000000"}})));
  EXPECT_EQ(held.allocated_unix_s, 1.7e9);
  struct At final : Clock {
    std::int64_t now_ms = 0;
    std::int64_t unix_ms() const override { return now_ms; }
    std::int64_t steady_ms() const override { return 500'000; }
  } clock;
  const auto since = [&](double after_s) {
    clock.now_ms = 1'700'000'000'000 + std::llround(after_s * 1000);
    return held.paid_since_steady_ms(clock, 499'000);
  };
  EXPECT_EQ(since(7.25), 492'750) << "from when the devices were held";
  EXPECT_EQ(since(0.5), 499'000) << "the program cannot have begun later than it did";
  EXPECT_EQ(since(-1), 499'000) << "a clock that is behind";
  EXPECT_EQ(since(7 * 3600), 499'000) << "of an allocation long ago";
  EXPECT_THROW(read_launcher(lookup(with(own, {{"TAILOR_ALLOCATED_AT", "noon"}}))), Error);
}

TEST(RankEnv, slurms_port_differs_between_neighbours_and_after_a_requeue) {
  std::set<int> ports;
  for (int job = 1; job <= 1000; ++job) {
    for (int restart = 0; restart < 8; ++restart) ports.insert(slurm_port(job, restart));
  }
  EXPECT_EQ(ports.size(), 8000U);
  EXPECT_GE(*ports.begin(), 20000);
  EXPECT_LT(*ports.rbegin(), 32000);
  EXPECT_GE(slurm_port(2'000'000'000, 3), 20000);
}

std::string complaint(const Variables& variables) {
  try {
    read_rank_env(lookup(variables));
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_NE(error.parts().mend, "");
    return to_text(error);
  }
  return "accepted";
}

TEST(RankEnv, contradictions_name_the_variable) {
  const std::vector<std::pair<Variables, std::string>> cases = {
      {{{"WORLD_SIZE", "2"}}, "WORLD_SIZE=2 is set and RANK is not"},
      {{{"RANK", "0"}}, "WORLD_SIZE is not set"},
      {with(kTorchrun, {{"RANK", "8"}}), "RANK=8 is not below WORLD_SIZE=8"},
      {with(kTorchrun, {{"RANK", "two"}}), "RANK='two' is not a whole number"},
      {with(kTorchrun, {{"RANK", "-1"}}), "RANK='-1'"},
      {with(kTorchrun, {{"WORLD_SIZE", "99999999999"}}), "WORLD_SIZE='99999999999'"},
      {with(kTorchrun, {{"WORLD_SIZE", "0"}}), "at least one rank"},
      {with(kTorchrun, {{"LOCAL_RANK", "2"}}), "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"},
      {with(kTorchrun, {{"LOCAL_WORLD_SIZE", "9"}}), "LOCAL_WORLD_SIZE=9 is more than"},
      {with(kTorchrun, {{"LOCAL_WORLD_SIZE", "0"}}), "LOCAL_WORLD_SIZE=0"},
      {with(kTorchrun, {{"MASTER_ADDR", ""}}), "MASTER_ADDR is not set"},
      {with(kTorchrun, {{"MASTER_PORT", "65536"}}), "MASTER_PORT=65536 is not a port"},
      {with(kTorchrun, {{"MASTER_PORT", "0"}}), "MASTER_PORT=0 is not a port"},
      {with(kTorchrun, {{"TORCHELASTIC_RESTART_COUNT", "x"}}), "TORCHELASTIC_RESTART_COUNT='x'"},
      {with(kSrun, {{"WORLD_SIZE", "4"}}), "set RANK=$SLURM_PROCID"},
      {with(kSrun, {{"SLURM_PROCID", "4"}}), "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"},
      {with(kSrun, {{"SLURM_JOB_NODELIST", "gpu[a-b]"}}), "'gpu[a-b]' is not of the form"},
      {with(kSrun, {{"SLURM_JOB_NODELIST", ""}}), "neither SLURM_JOB_NODELIST nor MASTER_ADDR"},
      {{{"JOB_COMPLETION_INDEX", "1"}, {"MASTER_ADDR", "a"}}, "WORLD_SIZE is not"},
  };
  for (const auto& [variables, text] : cases) EXPECT_THAT(complaint(variables), HasSubstr(text));
}

TEST(RankEnv, slurm_short_forms) {
  EXPECT_EQ(first_slurm_host("login"), "login");
  EXPECT_EQ(first_slurm_host("a,b[1-2]"), "a");
  EXPECT_EQ(first_slurm_host("gpu[03-05,9],x"), "gpu03");
  EXPECT_EQ(first_slurm_host("gpu[9,03]"), "gpu9");
  EXPECT_EQ(first_slurm_host("r[1-2]n[007-9]-ib,x"), "r1n007-ib");
  for (const char* wrong : {"", ",a", "a[", "a[]", "a]1", "a[-2]", "a[1", "a[x1]"}) {
    EXPECT_THROW(first_slurm_host(wrong), Error) << wrong;
  }
  EXPECT_THAT(slurm_tasks_per_node("2(x3),1"), ElementsAre(2, 2, 2, 1));
  EXPECT_THAT(slurm_tasks_per_node("4"), ElementsAre(4));
  for (const char* wrong : {"", "x", "2(x", "2(x)", "2(x3", "2x3", "0", "2(x0)", "2,,3"}) {
    EXPECT_THROW(slurm_tasks_per_node(wrong), Error) << wrong;
  }
}

TEST(RankEnv, the_error_file_is_as_torchrun_reads_it) {
  char folder[] = "/tmp/tailor-error-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  const std::string path = std::string(folder) + "/error.json";
  const Error error(Fault::io, {"the disk is full", "out/", "Free some."});
  write_error_file(error, lookup({{"TORCHELASTIC_ERROR_FILE", path}}));
  const Json written = read_json(path);
  EXPECT_THAT(written["message"]["message"].get<std::string>(), HasSubstr("the disk is full"));
  EXPECT_GT(std::stoll(written["message"]["extraInfo"]["timestamp"].get<std::string>()), 0);
  write_error_file(error, lookup({{"TORCHELASTIC_ERROR_FILE", "/nowhere/at/all"}}));
  write_error_file(error, lookup({}));
  std::filesystem::remove_all(folder);
}

TEST(RankPeers, nodes_are_hosts_unless_a_host_has_several) {
  const auto peer = [](const char* host, int local) {
    RankPeer out;
    out.host = host;
    out.local_world_size = local;
    return out;
  };
  EXPECT_THAT(nodes_of_ranks({peer("a", 0), peer("b", 0), peer("a", 0)}), ElementsAre(0, 1, 0));
  EXPECT_THAT(nodes_of_ranks({peer("a", 2), peer("a", 2), peer("a", 2), peer("a", 2)}),
              ElementsAre(0, 0, 1, 1));
}

}  // namespace
}  // namespace tailor
