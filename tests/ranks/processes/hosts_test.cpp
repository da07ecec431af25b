// Two hosts: network namespaces joined by a cable (veth) of 800 Mbit/s, each with a host name
// and an /etc/hosts of its own. Needs root; skipped without.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

#include "tests/ranks/processes/deaths.h"

namespace tailor {
namespace {

using ::testing::HasSubstr;

class TwoHosts : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string a = name(0), b = name(1);
    made_ = sh("ip netns add " + a) && sh("ip netns add " + b);
    if (!made_) GTEST_SKIP() << "no right to make network namespaces";
    // As a cheap network between machines.
    const std::string slow = " root tbf rate 800mbit burst 256kb latency 50ms";
    ASSERT_TRUE(sh("ip link add v0 netns " + a + " type veth peer name v1 netns " + b));
    for (int side = 0; side < 2; ++side) {
      const std::string in = "ip -n " + name(side), cable = "v" + std::to_string(side);
      ASSERT_TRUE(sh(in + " addr add " + address(side) + "/24 dev " + cable));
      ASSERT_TRUE(sh(in + " link set " + cable + " up") && sh(in + " link set lo up"));
      ASSERT_TRUE(sh("ip netns exec " + name(side) + " tc qdisc add dev " + cable + slow));
    }
  }
  void TearDown() override {
    for (int side = 0; side < 2; ++side) sh("ip netns del " + name(side));
  }

  static bool sh(const std::string& command) {
    return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
  }
  static std::string name(int side) {
    return "tailor-" + std::to_string(getpid()) + "-" + std::to_string(side);
  }
  static std::string address(int side) { return "10.77.0." + std::to_string(side + 1); }

  /// Two ranks on each host. `hosts`: what the /etc/hosts of each says.
  void start(RankProcesses& ranks, const std::string& what, const std::string& master_addr,
             const std::vector<std::string>& hosts) const {
    for (int r = 0; r < 4; ++r) {
      const int side = r / 2;
      const std::string file = (ranks.folder() / ("hosts" + std::to_string(side))).string();
      std::ofstream(file) << hosts[static_cast<std::size_t>(side)] << "\n";
      ranks.start(
          {"/bin/sh", "-c",
           "exec ip netns exec " + name(side) + " unshare --uts --mount /bin/sh -c 'mount --bind " +
               file + " /etc/hosts && hostname host" + std::to_string(side) + " && exec " +
               kRankProgram + " " + what + "'"},
          {{"RANK", std::to_string(r)},
           {"WORLD_SIZE", "4"},
           {"MASTER_ADDR", master_addr},
           {"MASTER_PORT", "23999"}});
    }
  }

  bool made_ = false;
};

TEST_F(TwoHosts, meet_without_settings_and_know_their_nodes) {
  RankProcesses ranks;
  start(ranks, "cases", address(0), {"127.0.0.1 localhost", "127.0.0.1 localhost"});
  ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
  for (int r = 0; r < 4; ++r) {
    EXPECT_EQ(ranks.exit_code(r), 0) << ranks.output(r);
    EXPECT_THAT(ranks.output(r), HasSubstr("node " + std::to_string(r % 2) + " of 2"));
  }
}

/// Debian writes a machine's own name into its /etc/hosts as 127.0.1.1, where nobody else finds it.
TEST_F(TwoHosts, meet_where_the_masters_name_is_loopback_at_home) {
  RankProcesses ranks;
  start(ranks, "cases", "head",
        {"127.0.0.1 localhost\n127.0.1.1 head", "127.0.0.1 localhost\n" + address(0) + " head"});
  ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
  for (int r = 0; r < 4; ++r) EXPECT_EQ(ranks.exit_code(r), 0) << ranks.output(r);
}

TEST_F(TwoHosts, a_cut_cable_is_a_dead_rank) {
  RankProcesses ranks;
  start(ranks, "die how=none timeout=2 leave=4", address(0),
        {"127.0.0.1 localhost", "127.0.0.1 localhost"});
  std::this_thread::sleep_for(std::chrono::seconds(3));
  ASSERT_FALSE(ranks.wait(0)) << ranks.outputs();
  ASSERT_TRUE(sh("ip -n " + name(0) + " link set v0 down"));
  ASSERT_TRUE(ranks.wait(2 + 10)) << ranks.outputs();
  for (int r = 0; r < 4; ++r) EXPECT_EQ(ranks.exit_code(r), 69) << ranks.output(r);
  EXPECT_THAT(ranks.output(0), HasSubstr("host host1"));
  EXPECT_THAT(ranks.output(2), HasSubstr("host host0"));
}

}  // namespace
}  // namespace tailor
