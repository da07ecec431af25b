#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "tests/support/rank_processes.h"

namespace tailor {

inline const std::string kRankProgram = std::string(TAILOR_BIN_DIR) + "/rank_program";

/// One rank of three dies in a call of some kind; the others must leave, saying so.
struct Death {
  std::string call, how;
  int victim = 0;
  double after_s = 0.3;
  std::string bytes = "1048576";
};

constexpr double kTimeout_s = 2, kLeave_s = 4;

/// Several at once, each a group of its own: most of it is waiting.
inline void survivors_leave_and_name_the_dead(const std::vector<Death>& deaths) {
  std::vector<std::unique_ptr<RankProcesses>> groups;
  for (const Death& death : deaths) {
    groups.push_back(std::make_unique<RankProcesses>());
    groups.back()->start_all(
        3, {kRankProgram, "die", "call=" + death.call, "how=" + death.how, "bytes=" + death.bytes,
            "victim=" + std::to_string(death.victim), "after=" + std::to_string(death.after_s),
            "timeout=" + std::to_string(kTimeout_s), "leave=" + std::to_string(kLeave_s)});
  }
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const Death& death = deaths[i];
    RankProcesses& ranks = *groups[i];
    SCOPED_TRACE(death.call + ", " + death.how + ", rank " + std::to_string(death.victim));
    ASSERT_TRUE(ranks.wait_for_text(death.victim, "dying at", 60)) << ranks.outputs();
    const std::string said = ranks.output(death.victim);
    const double died_at = std::stod(said.substr(said.find("dying at") + 8));
    const bool stopped = death.how == "stop";
    ASSERT_TRUE(ranks.wait(kTimeout_s + 15, stopped ? death.victim : -1)) << "somebody hangs\n"
                                                                          << ranks.outputs();
    for (int r = 0; r < ranks.size(); ++r) {
      if (r == death.victim) continue;
      EXPECT_EQ(ranks.exit_code(r), 69) << ranks.outputs();
      EXPECT_LT(ranks.of(r).ended_at - died_at, kTimeout_s + 10) << ranks.outputs();
      const std::string rank = "rank " + std::to_string(death.victim);
      EXPECT_THAT(ranks.output(r), ::testing::HasSubstr("error: " + rank)) << ranks.outputs();
      EXPECT_THAT(ranks.output(r),
                  ::testing::ContainsRegex(rank + " \\(host .*, pid " +
                                           std::to_string(ranks.of(death.victim).pid) + "\\)"));
      EXPECT_THAT(ranks.output(r), ::testing::HasSubstr("with --resume"));
    }
  }
}

}  // namespace tailor
