#pragma once

#include <memory>

#include "tests/e2e/ranks_program.h"

namespace tailor::testing_support {

/// A rank ends (KILL) or stops (STOP) at an instant of tests/support/die_at.cpp.
struct RankDeath {
  std::string name;   ///< for messages and folders
  std::string at;     ///< DIE_AT
  std::string after;  ///< DIE_AFTER, below the run's folder
  std::string how;
  int victim = 1;
};

/// "load", "step", "collective", "save": where in a run of train() that saves every third step.
inline RankDeath death_in(const std::string& phase, const std::string& how, int victim) {
  const std::string third = "checkpoints/step-00000003/manifest.json";
  RankDeath out{phase + "-" + how + "-" + std::to_string(victim), "", "", how, victim};
  if (phase == "load") out.at = "open .tiles 1";
  if (phase == "step") out.at = "ms 15", out.after = third;
  if (phase == "collective") out.at = "send 50", out.after = third;
  if (phase == "save") out.at = "fsync step-00000006 1";
  return out;
}

class RankDeaths : public RanksProgram {
 protected:
  static constexpr double kTimeout_s = 3;

  /// Two ranks, several runs at once (most of it is waiting): the survivor leaves in time with 69
  /// and names the dead, and the next attempt ends with the bits of a run that nobody disturbed.
  void survived(const std::vector<RankDeath>& deaths) {
    const std::vector<std::string> longer = {"training.max_steps=30"};
    if (!fs::exists(work_ / "whole")) {
      ASSERT_EQ(run(train("whole", 2, longer)).code, 0);
    }
    std::vector<std::unique_ptr<Group>> groups;
    for (const RankDeath& death : deaths) {
      groups.push_back(std::make_unique<Group>());
      for (int r = 0; r < 2; ++r) {
        RankProcesses::Variables more = {{"TAILOR_RANK_TIMEOUT", std::to_string(kTimeout_s)}};
        if (r == death.victim) {
          more["LD_PRELOAD"] = TAILOR_BIN_DIR "/libdie_at.so";
          more["DIE_AT"] = death.at;
          if (!death.after.empty()) more["DIE_AFTER"] = (work_ / death.name / death.after).string();
          more["DIE_HOW"] = death.how;
          more["DIE_NOTE"] = note(death).string();
        }
        start_rank(*groups.back(), r, 2, train(death.name, 2, longer), more);
      }
    }
    for (std::size_t i = 0; i < deaths.size(); ++i) {
      const RankDeath& death = deaths[i];
      SCOPED_TRACE(death.name);
      Group& group = *groups[i];
      const bool stopped = death.how == "STOP";
      ASSERT_TRUE(group.wait(kTimeout_s + 60, stopped ? death.victim : -1))
          << "somebody hangs\n"
          << group.processes.outputs();
      ASSERT_TRUE(fs::exists(note(death))) << "nobody died\n" << group.processes.outputs();
      const double died_at = std::stod(read_text(note(death)));
      const int survivor = 1 - death.victim;
      EXPECT_EQ(group.processes.exit_code(survivor), 69) << group.processes.outputs();
      EXPECT_LT(group.processes.of(survivor).ended_at - died_at, kTimeout_s + 10);
      EXPECT_THAT(group.processes.output(survivor),
                  ::testing::HasSubstr("error: rank " + std::to_string(death.victim)));
    }
    groups.clear();  // those who were stopped
    for (const RankDeath& death : deaths) {
      SCOPED_TRACE(death.name);
      std::vector<std::string> again = train(death.name, 2, longer);
      again.emplace_back("--resume");
      const Finished resumed = run(again);
      ASSERT_EQ(resumed.code, 0) << resumed.err;
      EXPECT_EQ(read_text(work_ / death.name / "adapter/adapter_model.safetensors"),
                read_text(work_ / "whole/adapter/adapter_model.safetensors"));
      EXPECT_EQ(losses(work_ / death.name), losses(work_ / "whole"));
    }
  }

 private:
  fs::path note(const RankDeath& death) const { return work_ / (death.name + ".died"); }
};

}  // namespace tailor::testing_support
