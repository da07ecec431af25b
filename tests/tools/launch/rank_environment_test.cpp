// What ranks are told, what a bare srun tells, and the port that stays ours.

#include "tools/launch/rank_environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <set>

#include "base/error.h"

namespace tailor {
namespace {

using testing::ElementsAre;

TEST(RankEnvironment, replaces_what_torchrun_says_and_keeps_the_rest) {
  RankPlace place;
  place.rank = 3;
  place.world_size = 8;
  place.local_rank = 1;
  place.local_world_size = 2;
  place.master_addr = "n1";
  place.master_port = 20001;
  const std::vector<std::string> before = {
      "HOME=/root",   "RANK=9",      "RANKS=2",   "OMP_NUM_THREADS=4",     "PET_NNODES=2",
      "GROUP_RANK=1", "ROLE_NAME=x", "ODD=a=b=c", "CUDA_VISIBLE_DEVICES=1"};
  EXPECT_THAT(rank_environment(place, before),
              ElementsAre("HOME=/root", "RANKS=2", "OMP_NUM_THREADS=4", "ODD=a=b=c",
                          "CUDA_VISIBLE_DEVICES=1", "RANK=3", "WORLD_SIZE=8", "LOCAL_RANK=1",
                          "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=n1", "MASTER_PORT=20001"));
  place.threads = 6;
  EXPECT_EQ(rank_environment(place, before).back(), "OMP_NUM_THREADS=6");
}

TEST(FirstHost, reads_slurms_lists) {
  EXPECT_EQ(first_host("n1"), "n1");
  EXPECT_EQ(first_host("n1,n2"), "n1");
  EXPECT_EQ(first_host("n[1-2]"), "n1");
  EXPECT_EQ(first_host("gpu-a[007,009-012],gpu-b3"), "gpu-a007");
  EXPECT_EQ(first_host("rack[1-2]node[3-4]"), "rack1node3");
  EXPECT_EQ(first_host("n[4]-ib,x"), "n4-ib");
  for (const char* bad : {"", ",n1", "n[1-2", "n[]", "n[,2]"}) {
    EXPECT_THROW(first_host(bad), Error) << bad;
  }
}

std::optional<RankPlace> place_of(std::map<std::string, std::string> variables) {
  return slurm_place([&](const std::string& name) { return variables[name]; });
}

TEST(SlurmPlace, is_what_torchrun_would_have_said) {
  const std::map<std::string, std::string> task = {
      {"SLURM_STEP_NUM_TASKS", "5"}, {"SLURM_PROCID", "3"},  {"SLURM_LOCALID", "1"},
      {"SLURM_GTIDS", "2,3,4"},      {"SLURM_JOB_ID", "77"}, {"SLURM_STEP_NODELIST", "n[1-2]"}};
  const auto place = place_of(task);
  ASSERT_TRUE(place);
  EXPECT_EQ(place->rank, 3);
  EXPECT_EQ(place->world_size, 5);
  EXPECT_EQ(place->local_rank, 1);
  EXPECT_EQ(place->local_world_size, 3);
  EXPECT_EQ(place->master_addr, "n1");
  EXPECT_EQ(place->master_port, slurm_port(77, 0));
  auto again = task;
  again["SLURM_RESTART_COUNT"] = "1";
  EXPECT_NE(place_of(again)->master_port, place->master_port);
}

TEST(SlurmPlace, is_nothing_outside_a_step_of_several_tasks) {
  EXPECT_FALSE(place_of({}));
  // A batch script's own environment has a PROCID, and no step.
  EXPECT_FALSE(place_of({{"SLURM_JOB_ID", "7"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}}));
  EXPECT_FALSE(place_of({{"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_PROCID", "0"}}));
  EXPECT_THROW(place_of({{"SLURM_STEP_NUM_TASKS", "two"}}), Error);
  EXPECT_THROW(place_of({{"SLURM_STEP_NUM_TASKS", "2"}}), Error);
}

TEST(SlurmPort, differs_between_neighbours_and_after_a_requeue) {
  std::set<int> ports;
  for (int job = 1; job <= 1000; ++job) {
    for (int restart = 0; restart < 8; ++restart) ports.insert(slurm_port(job, restart));
  }
  EXPECT_EQ(ports.size(), 8000U);
  EXPECT_GE(*ports.begin(), 20000);
  EXPECT_LT(*ports.rbegin(), 32000);
  EXPECT_GE(slurm_port(2'000'000'000, 3), 20000);
}

/// Whether a server's socket, as c10d's store opens it, gets the port.
bool can_listen(int port, int family, bool reuse) {
  const int server = ::socket(family, SOCK_STREAM, 0);
  const int on = 1;
  if (reuse) ::setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_storage address{};
  socklen_t size = 0;
  if (family == AF_INET6) {
    auto& six = reinterpret_cast<sockaddr_in6&>(address);
    six.sin6_family = AF_INET6;
    six.sin6_port = htons(static_cast<std::uint16_t>(port));
    size = sizeof six;
  } else {
    auto& four = reinterpret_cast<sockaddr_in&>(address);
    four.sin_family = AF_INET;
    four.sin_port = htons(static_cast<std::uint16_t>(port));
    size = sizeof four;
  }
  const bool ok =
      ::bind(server, reinterpret_cast<sockaddr*>(&address), size) == 0 && ::listen(server, 8) == 0;
  ::close(server);
  return ok;
}

TEST(ReservedPort, rank_0_can_listen_there_and_others_are_not_given_it) {
  const ReservedPort port;
  EXPECT_TRUE(can_listen(port.number(), AF_INET, true));
  EXPECT_FALSE(can_listen(port.number(), AF_INET, false));
  const int six = ::socket(AF_INET6, SOCK_STREAM, 0);
  if (six >= 0) {  // c10d listens on [::] where the machine has IPv6
    EXPECT_TRUE(can_listen(port.number(), AF_INET6, true));
    ::close(six);
  }
}

TEST(ReservedPort, two_launchers_never_share_one) {
  std::vector<std::unique_ptr<ReservedPort>> held;
  std::set<int> numbers;
  for (int i = 0; i < 200; ++i) {
    held.push_back(std::make_unique<ReservedPort>());
    numbers.insert(held.back()->number());
  }
  EXPECT_EQ(numbers.size(), 200U);
}

}  // namespace
}  // namespace tailor
