// The local launcher on shell commands: environment, output, signals, exit codes, and that nobody
// is left behind.

#include "tools/launch/local_launch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <map>

#include "base/clock.h"
#include "base/error.h"
#include "base/file.h"
#include "base/text.h"
#include "tests/tools/launch/temporary_folder.h"

namespace tailor {
namespace {

using testing::AnyOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

/// launch_local() in a child, its output in files, as a program would run it.
class LocalLaunchTest : public testing::Test {
 protected:
  pid_t start(const std::string& script, int ranks, LocalLaunch launch = {}) {
    launch.command = {"/bin/sh", "-c", script};
    launch.ranks = ranks;
    const pid_t child = ::fork();
    if (child != 0) return child;
    if (::chdir(folder_.path().c_str()) != 0) ::_exit(126);
    if (std::freopen("out", "w", stdout) == nullptr) ::_exit(126);
    if (std::freopen("err", "w", stderr) == nullptr) ::_exit(126);
    int code = 126;
    try {
      code = launch_local(launch);
    } catch (const Error& error) {
      std::fputs(to_text(error).c_str(), stderr);
      code = error.exit_code();
    }
    std::fflush(nullptr);
    ::_exit(code);
  }
  static int wait(pid_t child) {
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  int run(const std::string& script, int ranks, LocalLaunch launch = {}) {
    return wait(start(script, ranks, std::move(launch)));
  }
  std::string out() const { return read_text(folder_.path() / "out"); }
  std::string err() const { return read_text(folder_.path() / "err"); }
  bool appears(const std::string& name) const {
    for (int tries = 0; tries < 1000; ++tries) {
      if (fs::exists(folder_.path() / name)) return true;
      ::usleep(10'000);
    }
    return false;
  }
  std::vector<std::string> pids() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder_.path())) {
      if (entry.path().filename().string().starts_with("pid")) {
        found.emplace_back(trim(read_text(entry.path())));
      }
    }
    return found;
  }
  /// Whether a process is gone, or will be in a moment.
  static bool gone(const std::string& pid) {
    for (int tries = 0; tries < 500; ++tries) {
      if (::kill(std::stoi(pid), 0) != 0) return true;
      std::error_code error;
      // A zombie that its reaper has not collected yet does not run either.
      std::string stat;
      try {
        stat = read_text("/proc/" + pid + "/stat");
      } catch (const Error&) {
        return true;
      }
      if (stat.find(") Z ") != std::string::npos) return true;
      ::usleep(10'000);
    }
    return false;
  }

  testing_support::TemporaryFolder folder_;
};

constexpr const char* kShowEnvironment =
    "env > env$RANK; echo \"out of $RANK\"; echo \"err of $RANK\" >&2";

std::map<std::string, std::string> environment(const fs::path& file) {
  std::map<std::string, std::string> out;
  for (const std::string& line : split(read_text(file), '\n')) {
    const std::size_t equals = line.find('=');
    if (equals != std::string::npos) out[line.substr(0, equals)] = line.substr(equals + 1);
  }
  return out;
}

TEST_F(LocalLaunchTest, every_rank_gets_torchruns_words_and_one_port) {
  ::setenv("CUDA_VISIBLE_DEVICES", "5,6,7", 1);
  ::setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1);
  ::unsetenv("OMP_NUM_THREADS");
  const int code = run(kShowEnvironment, 3);
  ::unsetenv("CUDA_VISIBLE_DEVICES");
  ::unsetenv("TORCHELASTIC_USE_AGENT_STORE");
  ASSERT_EQ(code, 0);
  std::vector<std::string> ports;
  for (int rank = 0; rank < 3; ++rank) {
    auto env = environment(folder_.path() / ("env" + std::to_string(rank)));
    EXPECT_EQ(env["RANK"], std::to_string(rank));
    EXPECT_EQ(env["LOCAL_RANK"], std::to_string(rank));
    EXPECT_EQ(env["WORLD_SIZE"], "3");
    EXPECT_EQ(env["LOCAL_WORLD_SIZE"], "3");
    EXPECT_EQ(env["MASTER_ADDR"], "127.0.0.1");
    EXPECT_EQ(env["OMP_NUM_THREADS"], std::to_string(threads_per_rank(3)));
    EXPECT_EQ(env["CUDA_VISIBLE_DEVICES"], "5,6,7");
    EXPECT_EQ(env.count("TORCHELASTIC_USE_AGENT_STORE"), 0U);
    ports.push_back(env["MASTER_PORT"]);
  }
  EXPECT_THAT(ports, ElementsAre(ports[0], ports[0], ports[0]));
  EXPECT_GT(std::stoi(ports[0]), 1023);
}

TEST_F(LocalLaunchTest, threads_are_the_recipes_or_the_users_or_a_share_of_the_cores) {
  LocalLaunch launch;
  launch.threads = 7;
  ::setenv("OMP_NUM_THREADS", "3", 1);
  ASSERT_EQ(run("env > env$RANK", 2, launch), 0);
  EXPECT_EQ(environment(folder_.path() / "env1")["OMP_NUM_THREADS"], "7");
  ASSERT_EQ(run("env > env$RANK", 2), 0);
  ::unsetenv("OMP_NUM_THREADS");
  EXPECT_EQ(environment(folder_.path() / "env1")["OMP_NUM_THREADS"], "3");
  EXPECT_EQ(threads_per_rank(1'000'000), 1);
}

TEST_F(LocalLaunchTest, rank_0_passes_through_and_the_others_are_named) {
  ASSERT_EQ(run(kShowEnvironment, 3), 0);
  EXPECT_EQ(out(), "out of 0\n");
  EXPECT_THAT(err(), HasSubstr("err of 0\n"));
  EXPECT_THAT(err(), Not(HasSubstr("[rank 0]")));
  EXPECT_THAT(err(), HasSubstr("[rank 1] err of 1\n"));
  EXPECT_THAT(err(), HasSubstr("[rank 2] err of 2\n"));
  EXPECT_THAT(err(), Not(HasSubstr("out of 1")));
}

TEST_F(LocalLaunchTest, stdout_of_a_rank_that_fails_is_shown) {
  EXPECT_EQ(run("echo \"out of $RANK\"; test $RANK = 1 && exit 65; sleep 0.3", 3), 65);
  EXPECT_EQ(out(), "out of 0\n");
  EXPECT_THAT(err(), HasSubstr("[rank 1] out of 1\n"));
  EXPECT_THAT(err(), Not(HasSubstr("out of 2")));
  EXPECT_THAT(err(), HasSubstr("rank 1 of 3 left with 65"));
}

TEST_F(LocalLaunchTest, the_telling_code_wins_over_another_rank_died) {
  // Ranks 0 and 2 notice first that rank 1 does not answer, as a slow failure has it.
  EXPECT_EQ(run("test $RANK = 1 && { sleep 0.5; exit 66; }; exit 69", 3), 66);
  EXPECT_EQ(run("test $RANK = 1 && exit 69; exit 0", 2), 69);
  EXPECT_EQ(run("exit 0", 2), 0);
}

TEST_F(LocalLaunchTest, a_rank_killed_from_outside_is_69_and_a_crash_is_70) {
  EXPECT_EQ(run("test $RANK = 1 && kill -KILL $$; sleep 0.2; exit 69", 3), 69);
  EXPECT_THAT(err(), HasSubstr("error: rank 1 of 3 was ended by signal 9"));
  EXPECT_EQ(run("test $RANK = 1 && kill -SEGV $$; sleep 0.2; exit 69", 3), 70);
  EXPECT_THAT(err(), HasSubstr("error: rank 1 of 3 was ended by signal 11"));
}

TEST_F(LocalLaunchTest, others_get_time_to_leave_then_sigterm_then_sigkill) {
  LocalLaunch launch;
  launch.leave_ms = 300;
  launch.kill_ms = 300;
  const double before = seconds_now();
  EXPECT_EQ(run("test $RANK = 1 && exit 66; "
                "test $RANK = 0 && trap 'echo asked >&2; exit 75' TERM; "
                "test $RANK = 2 && trap '' TERM; "
                "while :; do sleep 0.05; done",
                3, launch),
            66);
  const double seconds = seconds_now() - before;
  EXPECT_GE(seconds, 0.6);
  EXPECT_LT(seconds, 5);
  EXPECT_THAT(err(), HasSubstr("asked\n"));
}

TEST_F(LocalLaunchTest, a_rank_that_stops_in_order_does_not_hurry_the_others) {
  LocalLaunch launch;
  launch.leave_ms = 100;
  launch.kill_ms = 100;
  EXPECT_EQ(run("test $RANK = 1 && exit 76; sleep 0.8; echo saved > saved; exit 76", 2, launch),
            76);
  EXPECT_TRUE(fs::exists(folder_.path() / "saved"));
}

TEST_F(LocalLaunchTest, sigterm_reaches_each_rank_once_and_the_run_stops_in_order) {
  // The child that a signal to the whole group would end first must see the rank's end instead.
  const pid_t child = start(
      "trap 'echo x >> terms$RANK; exit 75' TERM; : > ready$RANK; while :; do sleep 0.05; done", 2);
  ASSERT_TRUE(appears("ready0") && appears("ready1"));
  ::kill(child, SIGTERM);
  EXPECT_EQ(wait(child), 75);
  EXPECT_EQ(read_text(folder_.path() / "terms0"), "x\n");
  EXPECT_EQ(read_text(folder_.path() / "terms1"), "x\n");
}

TEST_F(LocalLaunchTest, a_second_signal_kills) {
  const pid_t child = start(
      "trap 'echo x >> terms$RANK' TERM INT; echo $$ > pid$RANK; : > ready$RANK; "
      "while :; do sleep 0.05; done",
      2);
  ASSERT_TRUE(appears("ready0") && appears("ready1"));
  ::kill(child, SIGTERM);
  ASSERT_TRUE(appears("terms0") && appears("terms1"));
  ::kill(child, SIGINT);
  EXPECT_EQ(wait(child), 75);
  EXPECT_EQ(read_text(folder_.path() / "terms0"), "x\n");
  for (const std::string& pid : pids()) EXPECT_TRUE(gone(pid)) << pid;
}

TEST_F(LocalLaunchTest, sigusr1_is_passed_on_each_time) {
  const pid_t child = start(
      "trap 'echo x >> usr1_$RANK' USR1; trap 'exit 75' TERM; : > ready$RANK; "
      "while :; do sleep 0.05; done",
      2);
  ASSERT_TRUE(appears("ready0") && appears("ready1"));
  ::kill(child, SIGUSR1);
  ASSERT_TRUE(appears("usr1_0") && appears("usr1_1"));
  ::kill(child, SIGTERM);
  EXPECT_EQ(wait(child), 75);
}

TEST_F(LocalLaunchTest, no_rank_outlives_a_launcher_that_is_killed) {
  const pid_t child = start("echo $$ > pid$RANK; : > ready$RANK; while :; do sleep 0.05; done", 3);
  ASSERT_TRUE(appears("ready0") && appears("ready1") && appears("ready2"));
  ::kill(child, SIGKILL);
  EXPECT_EQ(wait(child), 128 + SIGKILL);
  ASSERT_EQ(pids().size(), 3U);
  for (const std::string& pid : pids()) EXPECT_TRUE(gone(pid)) << pid;
}

TEST_F(LocalLaunchTest, children_of_a_rank_go_with_it) {
  EXPECT_EQ(run("sleep 1000 & echo $! > pid$RANK; exit 0", 2), 0);
  ASSERT_EQ(pids().size(), 2U);
  for (const std::string& pid : pids()) EXPECT_TRUE(gone(pid)) << pid;
}

TEST_F(LocalLaunchTest, stdin_is_empty) {
  EXPECT_EQ(run("cat > in$RANK", 2), 0);
  EXPECT_EQ(read_text(folder_.path() / "in0"), "");
}

TEST_F(LocalLaunchTest, much_output_of_every_rank_arrives_whole) {
  ASSERT_EQ(
      run("i=0; while [ $i -lt 2000 ]; do echo \"line $i of $RANK\" >&2; i=$((i+1)); done", 3), 0);
  int lines = 0;
  for (const std::string& line : split(err(), '\n')) {
    if (line.empty()) continue;
    ++lines;
    EXPECT_THAT(line, testing::MatchesRegex("(\\[rank [12]\\] )?line [0-9]+ of [012]"));
  }
  EXPECT_EQ(lines, 6000);
}

TEST(LocalLaunch, a_program_that_is_not_there_is_named) {
  LocalLaunch launch;
  launch.command = {"/nowhere/tailor"};
  launch.ranks = 2;
  try {
    launch_local(launch);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::usage);
    EXPECT_EQ(error.parts().what, "cannot start /nowhere/tailor: No such file or directory");
  }
}

TEST(EndOf, what_the_run_says_about_all_ranks) {
  const auto left = [](int rank, int code) { return RankEnd{rank, false, code, false}; };
  const auto killed = [](int rank, int signal, bool by_us) {
    return RankEnd{rank, true, signal, by_us};
  };
  EXPECT_EQ(end_of({left(0, 0), left(1, 0)}, false).code, 0);
  EXPECT_EQ(end_of({left(0, 69), left(1, 65), left(2, 66)}, false).code, 65);
  EXPECT_EQ(end_of({left(0, 69), killed(1, SIGKILL, false)}, false).cause->rank, 1);
  EXPECT_EQ(end_of({left(0, 69), killed(1, SIGKILL, true)}, false).cause->rank, 0);
  EXPECT_EQ(end_of({left(1, 66), killed(0, SIGKILL, true)}, false).code, 66);
  EXPECT_EQ(end_of({killed(0, SIGTERM, false), killed(1, SIGTERM, false)}, true).code, 75);
  EXPECT_EQ(end_of({killed(0, SIGKILL, true), killed(1, SIGKILL, true)}, true).code, 75);
  EXPECT_EQ(end_of({killed(1, SIGTERM, false), left(0, 69)}, false).code, 69);
}

}  // namespace
}  // namespace tailor
