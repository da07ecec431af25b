// What ranks are told, and the port that stays ours.

#include "tools/launch/rank_environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

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
