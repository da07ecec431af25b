// The ways to start ranks wrongly, each with the message a person gets.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <csignal>

#include "base/file.h"
#include "tests/ranks/processes/deaths.h"

namespace tailor {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using Variables = RankProcesses::Variables;

const std::vector<std::string> kQuick = {kRankProgram, "none", "connect=2", "join=2", "notice=0.5"};

Variables place(int rank, int world_size, int port, const Variables& more = {}) {
  Variables out = {{"RANK", std::to_string(rank)},
                   {"WORLD_SIZE", std::to_string(world_size)},
                   {"MASTER_ADDR", "127.0.0.1"},
                   {"MASTER_PORT", std::to_string(port)}};
  for (const auto& [name, value] : more) out[name] = value;
  return out;
}

/// Someone else's server at 127.0.0.1: says `answer` to who comes and hangs up, or, when that is
/// empty, nothing at all.
class Stranger {
 public:
  explicit Stranger(std::string answer = "") : answer_(std::move(answer)) {
    socket_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<std::uint16_t>(port_));
    if (bind(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
        listen(socket_, 16) != 0) {
      throw std::runtime_error("cannot listen");
    }
    thread_ = std::thread([this] {
      while (!over_) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        if (answer_.empty()) continue;
        const int other = accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC);
        if (other < 0) continue;
        (void)!send(other, answer_.data(), answer_.size(), MSG_NOSIGNAL);
        close(other);
      }
    });
  }
  Stranger(const Stranger&) = delete;
  Stranger& operator=(const Stranger&) = delete;
  ~Stranger() {
    over_ = true;
    thread_.join();
    close(socket_);
  }
  int port() const { return port_; }

 private:
  std::string answer_;
  int port_ = free_port(), socket_ = -1;
  std::atomic<bool> over_ = false;
  std::thread thread_;
};

TEST(RankMeeting, nobody_at_the_address) {
  RankProcesses ranks;
  const int port = free_port();
  ranks.start(kQuick, place(1, 2, port));
  ASSERT_TRUE(ranks.wait(10)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 69);
  const std::string at = "rank 0 at 127.0.0.1:" + std::to_string(port);
  EXPECT_THAT(ranks.output(0), AllOf(HasSubstr("waiting for " + at + ": Connection refused"),
                                     HasSubstr("error: rank 1 cannot reach " + at + " within 2"),
                                     HasSubstr("no firewall blocks port")));
}

TEST(RankMeeting, a_host_name_that_is_not_known) {
  RankProcesses ranks;
  ranks.start(kQuick, place(1, 2, 29500, {{"MASTER_ADDR", "no-such-host.invalid"}}));
  ASSERT_TRUE(ranks.wait(30)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 69);
  EXPECT_THAT(ranks.output(0), HasSubstr("the name 'no-such-host.invalid' is not known here"));
}

TEST(RankMeeting, a_port_in_use) {
  const Stranger stranger;
  RankProcesses ranks;
  ranks.start(kQuick, place(0, 2, stranger.port()));
  ASSERT_TRUE(ranks.wait(10)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 69);
  EXPECT_THAT(ranks.output(0),
              AllOf(HasSubstr("port " + std::to_string(stranger.port()) + " is in use"),
                    HasSubstr("Set MASTER_PORT")));
}

TEST(RankMeeting, somebody_elses_server) {
  for (const char* answer : {"", "HTTP/1.1 400 Bad Request\r\n\r\n"}) {
    const Stranger stranger(answer);
    RankProcesses ranks;
    ranks.start(kQuick, place(1, 2, stranger.port()));
    ASSERT_TRUE(ranks.wait(15)) << ranks.outputs();
    EXPECT_EQ(ranks.exit_code(0), 2) << ranks.output(0);
    EXPECT_THAT(ranks.output(0), HasSubstr("is not this run's meeting point")) << answer;
  }
}

TEST(RankMeeting, somebody_elses_store) {
  RankProcesses ranks;
  const int port = free_port();
  ranks.start({TAILOR_PYTHON, "-c",
               "import sys, time, torch.distributed as d\n"
               "s = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, "
               "wait_for_workers=False)\n"
               "print('open', flush=True); time.sleep(60)",
               std::to_string(port)},
              {});
  ASSERT_TRUE(ranks.wait_for_text(0, "open", 60)) << ranks.outputs();
  ranks.start(kQuick, place(1, 2, port));
  ASSERT_TRUE(ranks.wait(15, 0)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(1), 2);
  EXPECT_THAT(ranks.output(1), HasSubstr("a store of another program"));
}

TEST(RankMeeting, an_earlier_run_that_is_still_alive) {
  RankProcesses ranks;
  const int port = free_port();
  for (const int r : {0, 1}) ranks.start({kRankProgram, "wait"}, place(r, 2, port));
  ASSERT_TRUE(ranks.wait_for_text(0, "ready", 30)) << ranks.outputs();
  ranks.start(kQuick, place(1, 2, port));
  ranks.start(kQuick, place(1, 2, port, {{"TORCHELASTIC_RUN_ID", "later"}}));
  const double until = seconds_now() + 10;
  while (seconds_now() < until && (ranks.exit_code(2) < 0 || ranks.exit_code(3) < 0)) ranks.wait(0);
  EXPECT_EQ(ranks.exit_code(2), 2);
  EXPECT_THAT(ranks.output(2), AllOf(HasSubstr("is rank 1 there already"),
                                     HasSubstr("pid " + std::to_string(ranks.of(1).pid))));
  EXPECT_EQ(ranks.exit_code(3), 2);
  EXPECT_THAT(ranks.output(3), HasSubstr("it belongs to job '', this is 'later start 0'"));
}

TEST(RankMeeting, ranks_of_different_world_sizes_both_say_so) {
  RankProcesses ranks;
  const int port = free_port();
  ranks.start(kQuick, place(0, 2, port));
  ranks.start(kQuick, place(1, 3, port));
  ASSERT_TRUE(ranks.wait(15)) << ranks.outputs();
  for (const int r : {0, 1}) {
    EXPECT_EQ(ranks.exit_code(r), 2) << ranks.outputs();
    EXPECT_THAT(ranks.output(r), AllOf(HasSubstr("rank 0 with WORLD_SIZE=2"),
                                       HasSubstr("rank 1 with WORLD_SIZE=3")));
  }
}

TEST(RankMeeting, ranks_that_do_not_come_are_named) {
  RankProcesses ranks;
  const int port = free_port();
  for (const int r : {0, 2}) ranks.start(kQuick, place(r, 4, port));
  ASSERT_TRUE(ranks.wait(15)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 69);
  EXPECT_THAT(ranks.output(0),
              AllOf(HasSubstr("waiting for ranks 1, 3 of 4"), HasSubstr("error: waited 2")));
}

TEST(RankMeeting, variables_that_contradict_each_other) {
  RankProcesses ranks;
  ranks.start(kQuick, {{"WORLD_SIZE", "2"}, {"RANK", ""}});
  ASSERT_TRUE(ranks.wait(10));
  EXPECT_EQ(ranks.exit_code(0), 2);
  EXPECT_THAT(ranks.output(0), HasSubstr("WORLD_SIZE=2 is set and RANK is not"));
}

TEST(RankMeeting, backends_that_do_not_fit_the_device) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"backend=nccl"}, "backend nccl moves device memory"},
      {{"backend=gloo", "cuda=1"}, "backend gloo moves host memory"},
      {{"backend=mpi"}, "backend 'mpi' is not known"}};
  for (const auto& [arguments, text] : cases) {
    RankProcesses ranks;
    std::vector<std::string> command = kQuick;
    command.insert(command.end(), arguments.begin(), arguments.end());
    ranks.start(command, place(0, 1, free_port()));
    ASSERT_TRUE(ranks.wait(20)) << ranks.outputs();
    EXPECT_EQ(ranks.exit_code(0), 2);
    EXPECT_THAT(ranks.output(0), HasSubstr(text));
  }
}

/// On a machine with a GPU the first loads and talks over NCCL; elsewhere it says what is missing.
TEST(RankMeeting, nccl_is_loaded_where_it_is_asked_for) {
  RankProcesses ranks;
  std::vector<std::string> command = kQuick;
  command[1] = "cases";
  command.insert(command.end(), {"backend=nccl", "cuda=1"});
  ranks.start(command, place(0, 1, free_port()));
  ASSERT_TRUE(ranks.wait(60)) << ranks.outputs();
  if (ranks.exit_code(0) == 0) return;
  EXPECT_TRUE(ranks.exit_code(0) == 69 || ranks.exit_code(0) == 2) << ranks.outputs();
  EXPECT_THAT(ranks.output(0), ::testing::AnyOf(HasSubstr("error: NCCL: "),
                                                HasSubstr("backend nccl cannot be loaded")));
}

std::vector<std::string> torchrun(const std::vector<std::string>& more) {
  std::vector<std::string> out = {(fs::path(TAILOR_PYTHON).parent_path() / "torchrun").string(),
                                  "--standalone", "--no-python", "--nproc-per-node=2"};
  out.insert(out.end(), more.begin(), more.end());
  return out;
}

TEST(Torchrun, keeps_the_store_and_starts_the_ranks) {
  RankProcesses ranks;
  ranks.start(torchrun({kRankProgram, "cases"}), {});
  ASSERT_TRUE(ranks.wait(90)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 0) << ranks.output(0);
  EXPECT_THAT(ranks.output(0), AllOf(HasSubstr("node 0 of 2"), HasSubstr("node 1 of 2")));
}

TEST(Torchrun, reads_the_reason_of_a_failure_and_starts_anew_over_the_same_store) {
  RankProcesses ranks;
  ranks.start(torchrun({"--max-restarts=1", kRankProgram, "die", "how=throw", "once=yes",
                        "steps=30", "timeout=4"}),
              {});
  ASSERT_TRUE(ranks.wait(120)) << ranks.outputs();
  EXPECT_EQ(ranks.exit_code(0), 0) << ranks.output(0);
  EXPECT_THAT(ranks.output(0), HasSubstr("error: the disk is full"));

  RankProcesses failed;
  failed.start(torchrun({kRankProgram, "die", "how=throw", "timeout=4"}), {});
  ASSERT_TRUE(failed.wait(120)) << failed.outputs();
  EXPECT_NE(failed.exit_code(0), 0);
  // The agent's own summary, from the error file.
  const std::string said = failed.output(0);
  ASSERT_THAT(said, HasSubstr("Root Cause"));
  EXPECT_THAT(said.substr(said.find("Root Cause")), HasSubstr("the disk is full"));
}

}  // namespace
}  // namespace tailor
