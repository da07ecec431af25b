// One rank of a group of processes, for tests: does what its arguments say and ends as a run would.
//   rank_program WHAT [name=value...]

#include <dirent.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <thread>

#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "tests/ranks/cases.h"
#include "trainer/ranks/c10d_ranks.h"

namespace tailor {
namespace {

using Arguments = std::map<std::string, std::string>;

std::string text_of(const Arguments& arguments, const std::string& name, const std::string& other) {
  const auto found = arguments.find(name);
  return found == arguments.end() ? other : found->second;
}
double number_of(const Arguments& arguments, const std::string& name, double other) {
  const auto found = arguments.find(name);
  return found == arguments.end() ? other : std::stod(found->second);
}

/// As a cut cable: every connection of this process ends, its descriptors stay.
void cut_connections() {
  for (int descriptor = 3; descriptor < 1024; ++descriptor) {
    sockaddr_storage other{};
    socklen_t length = sizeof other;
    if (getpeername(descriptor, reinterpret_cast<sockaddr*>(&other), &length) == 0) {
      shutdown(descriptor, SHUT_RDWR);
    }
  }
}

void run_cases(Ranks& ranks) {
  collectives_move_what_they_say(ranks);
  sums_are_taken_in_rank_order(ranks);
  texts_of_any_length_reach_everybody(ranks);
  payload_is_what_the_algorithm_must_send(ranks);

  const auto channel = ranks.channel("tiles"), twin = ranks.channel("tiles");
  const auto node = ranks.node_channel("node");
  std::thread aside([&] {
    for (int i = 0; i < 50; ++i) EXPECT_EQ(sum_over_ranks(*channel, i), 1.0 * ranks.size() * i);
  });
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(sum_over_ranks(ranks, 2.0 * i), 2.0 * ranks.size() * i);
    EXPECT_EQ(sum_over_ranks(*node, 1), node->size());
  }
  aside.join();
  collectives_move_what_they_say(*twin);
  std::printf("node %d of %d\n", node->rank(), node->size());
}

/// What several runs must have in common to the bit.
void print_bits(Ranks& ranks) {
  const auto count = static_cast<std::size_t>(ranks.size());
  std::string all_bits;
  for (const std::size_t n : {std::size_t{1}, std::size_t{1000}, std::size_t{300'000}}) {
    std::vector<float> all(n * count), mine(n);
    std::uint32_t state = 1 + static_cast<std::uint32_t>(ranks.rank());
    for (float& value : all) {
      state = state * 1664525U + 1013904223U;
      value = static_cast<float>(static_cast<std::int32_t>(state)) * 1e-7F;
    }
    ranks.reduce_scatter(all, mine);
    std::vector<double> sums(
        mine.begin(), mine.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(n, 100)));
    ranks.all_reduce(sums, Reduce::sum);
    std::vector<std::byte> gathered(mine.size() * 4 * count);
    ranks.all_gather(std::as_bytes(std::span(mine)), gathered);
    all_bits.append(reinterpret_cast<const char*>(gathered.data()), gathered.size());
    all_bits.append(reinterpret_cast<const char*>(sums.data()), sums.size() * 8);
  }
  std::printf("bits %s\n", sha256_hex(all_bits).c_str());
}

void one_call(Ranks& ranks, const std::string& which, std::size_t n) {
  const auto count = static_cast<std::size_t>(ranks.size());
  if (which == "all-gather") {
    std::vector<std::byte> mine(n), all(n * count);
    ranks.all_gather(mine, all);
  } else if (which == "reduce-scatter") {
    std::vector<float> all(n / 4 * count), mine(n / 4);
    ranks.reduce_scatter(all, mine);
  } else if (which == "all-reduce") {
    std::vector<double> values(n / 8);
    ranks.all_reduce(values, Reduce::sum);
  } else if (which == "gather") {
    std::vector<std::byte> mine(n), all(ranks.first() ? n * count : 0);
    ranks.gather(mine, all, 0);
  } else if (which == "broadcast") {
    std::vector<std::byte> bytes(n);
    ranks.broadcast(bytes, ranks.size() - 1);
  } else if (which == "barrier") {
    ranks.barrier();
  } else if (which == "channel") {
    ranks.channel("late")->barrier();
  } else {
    throw std::runtime_error("no such call: " + which);
  }
}

/// Calls go on until rank `victim` ends as `how` says, in the middle of them.
void die_in(Ranks& ranks, const Arguments& arguments) {
  const std::string which = text_of(arguments, "call", "all-gather");
  std::string how = text_of(arguments, "how", "kill");
  const auto n = static_cast<std::size_t>(number_of(arguments, "bytes", 1 << 20));
  const bool victim = ranks.rank() == static_cast<int>(number_of(arguments, "victim", 1));
  const double after_s = number_of(arguments, "after", 0.3);
  RankWatch& watch = *watch_of(ranks);
  std::thread killer;
  if (victim) {
    killer = std::thread([=] {
      std::this_thread::sleep_for(std::chrono::duration<double>(after_s));
      std::printf("dying at %.3f\n", seconds_now());
      std::fflush(stdout);
      if (how == "kill" || how == "busy") kill(getpid(), SIGKILL);
      if (how == "stop") kill(getpid(), SIGSTOP);
      if (how == "cut") cut_connections();
    });
    killer.detach();
  }
  // Only torchrun's first start fails.
  const char* const restart = std::getenv("TORCHELASTIC_RESTART_COUNT");
  if (text_of(arguments, "once", "") == "yes" && restart != nullptr && *restart != '0')
    how = "none";
  const int steps = static_cast<int>(number_of(arguments, "steps", 1e9));
  for (int step = 0; step < steps; ++step) {
    watch.set_phase("step " + std::to_string(step) + ", forward");
    if (victim && how == "throw" && step == 20) {
      throw Error(Fault::io, {"the disk is full", "here", "Free some space."});
    }
    if (victim && how == "hang" && step == 20) {
      watch.set_phase("looking out of the window");
      std::this_thread::sleep_for(std::chrono::seconds(600));
    }
    if (how == "busy" && step == 20) {  // and the others do not come out of what they compute
      std::this_thread::sleep_for(std::chrono::seconds(600));
    }
    if (victim && how == "abort" && step == 20) {
      ranks.abort();
      throw Error(Fault::bad_file, {"row 7 is no JSON", "rows.jsonl:7", "Mend the row."});
    }
    if (victim && how == "leave" && step == 20) return;
    one_call(ranks, which, n);
  }
}

int run(const std::string& what, const Arguments& arguments) {
  ConnectOptions options;
  options.meet.connect_timeout_s = number_of(arguments, "connect", 30);
  options.meet.join_timeout_s = number_of(arguments, "join", 30);
  options.meet.notice_s = number_of(arguments, "notice", 5);
  options.watch.timeout_s = number_of(arguments, "timeout", 10);
  options.watch.collective_timeout_s = number_of(arguments, "collective", 60);
  options.watch.leave_s = number_of(arguments, "leave", 10);
  options.backend = rank_backend(text_of(arguments, "backend", "auto"));
  options.cuda = number_of(arguments, "cuda", 0) != 0;

  const std::optional<RankEnv> env = read_rank_env();
  const std::unique_ptr<Ranks> ranks = env ? connect_ranks(*env, options) : single_rank();
  with_watch(watch_of(*ranks), [&] {
    if (what == "cases") run_cases(*ranks);
    if (what == "disagree") disagree(*ranks);
    if (what == "bits") print_bits(*ranks);
    if (what == "die") die_in(*ranks, arguments);
    if (what == "patient") {
      const RankWatch::Patience patience(watch_of(*ranks));
      if (ranks->first()) std::this_thread::sleep_for(std::chrono::seconds(3));
      ranks->barrier();
    }
    if (what == "wait" && ranks->first()) {
      std::printf("ready\n");
      std::fflush(stdout);
      std::this_thread::sleep_for(std::chrono::seconds(600));
    }
  });
  return ::testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed() ? 1 : 0;
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  tailor::start_log(tailor::LogLevel::info);
  tailor::Arguments arguments;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::size_t equals = argument.find('=');
    arguments[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  try {
    return tailor::run(argc > 1 ? argv[1] : "", arguments);
  } catch (const tailor::Error& error) {
    std::fputs(tailor::to_text(error).c_str(), stderr);
    tailor::write_error_file(error);
    return error.exit_code();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "unexpected: %s\n", error.what());
    return 70;
  }
}
