#include <random>

#include "tests/ranks/processes/deaths.h"

namespace tailor {
namespace {

TEST(RankDeaths, every_call_every_way_and_rank) {
  for (const char* how : {"kill", "stop", "cut"}) {
    for (const char* call : {"all-gather", "reduce-scatter", "all-reduce", "gather", "broadcast",
                             "barrier", "channel"}) {
      survivors_leave_and_name_the_dead({{call, how, 0}, {call, how, 1}, {call, how, 2}});
    }
  }
}

TEST(RankDeaths, two_hundred_at_any_time_in_any_call) {
  const std::vector<std::string> calls = {"all-gather", "reduce-scatter", "all-reduce", "gather",
                                          "broadcast",  "barrier",        "channel"};
  const std::vector<std::string> ways = {"kill", "stop", "cut"};
  std::mt19937 random(20261124);
  for (int round = 0; round < 50 && !HasFailure(); ++round) {
    std::vector<Death> deaths;
    for (int i = 0; i < 4; ++i) {
      deaths.push_back({calls[random() % calls.size()], ways[random() % ways.size()],
                        static_cast<int>(random() % 3), static_cast<double>(random() % 1000) / 1000,
                        std::to_string(8U << (random() % 20))});
    }
    survivors_leave_and_name_the_dead(deaths);
  }
}

TEST(RankMeeting, by_default_the_message_comes_within_30_seconds_and_a_line_after_5) {
  RankProcesses ranks;
  const double began = seconds_now();
  ranks.start({kRankProgram, "none"}, {{"RANK", "1"},
                                       {"WORLD_SIZE", "2"},
                                       {"MASTER_ADDR", "127.0.0.1"},
                                       {"MASTER_PORT", std::to_string(free_port())}});
  ASSERT_TRUE(ranks.wait_for_text(0, "waiting for rank 0", 7));
  EXPECT_GT(seconds_now() - began, 4);
  ASSERT_TRUE(ranks.wait(32)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 69);
  EXPECT_LT(ranks.of(0).ended_at - began, 32);
}

}  // namespace
}  // namespace tailor
