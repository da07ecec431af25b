// What it costs to bring a tile together over loopback, against bare sockets, and what reaches the
// wire. usage: bench_ranks [tile MiB = 16] [rounds = 20] [ranks = 2 and 4]
//
// Each variant runs in turn within a round, so that what else the machine does meets all alike; the
// least time of the rounds counts. Ranks are forked processes. With the right to make a network
// namespace (root) the wire's bytes are those of its own loopback device, headers and
// acknowledgements included.

#include <ATen/ops/from_blob.h>
#include <arpa/inet.h>
#include <linux/if.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/clock.h"
#include "base/processor_time.h"
#include "tests/support/rank_processes.h"
#include "trainer/ranks/c10d_ranks.h"

namespace tailor {
namespace {

std::int64_t wire_bytes() {
  std::ifstream file("/proc/net/dev");
  std::string line;
  while (std::getline(file, line)) {
    const std::size_t at = line.find("lo:");
    if (at == std::string::npos) continue;
    return std::stoll(line.substr(at + 3));  // received, which on loopback is sent
  }
  return 0;
}

/// A network of this process's own, so that the counters are this program's.
bool own_network() {
  if (unshare(CLONE_NEWNET) != 0) return false;
  const int socket = ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  ifreq request{};
  std::strcpy(request.ifr_name, "lo");
  request.ifr_flags = IFF_UP | IFF_RUNNING;
  const bool up = ioctl(socket, SIOCSIFFLAGS, &request) == 0;
  close(socket);
  return up;
}

/// TCP connections between all ranks, opened before they are forked: [rank][peer].
std::vector<std::vector<int>> connect_all(int count) {
  std::vector<std::vector<int>> out(static_cast<std::size_t>(count),
                                    std::vector<int>(static_cast<std::size_t>(count), -1));
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      listen(listener, 64) != 0 ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    throw std::runtime_error("cannot listen");
  }
  for (std::size_t a = 0; a < out.size(); ++a) {
    for (std::size_t b = a + 1; b < out.size(); ++b) {
      out[a][b] = socket(AF_INET, SOCK_STREAM, 0);
      if (connect(out[a][b], reinterpret_cast<sockaddr*>(&address), length) != 0) {
        throw std::runtime_error("cannot connect");
      }
      out[b][a] = accept(listener, nullptr, nullptr);
    }
  }
  close(listener);
  return out;
}

/// Everybody's part to everybody, by one thread that polls: as little as sockets allow.
void bare_all_gather(const std::vector<int>& peers, int rank, std::byte* all, std::size_t part) {
  struct Side {
    int socket;
    std::size_t sent = 0, received = 0, from;
  };
  std::vector<Side> sides;
  for (std::size_t p = 0; p < peers.size(); ++p) {
    if (peers[p] >= 0) sides.push_back({peers[p], 0, 0, p});
  }
  const std::byte* const mine = all + part * static_cast<std::size_t>(rank);
  std::vector<pollfd> wanted(sides.size());
  while (true) {
    bool open = false;
    for (std::size_t i = 0; i < sides.size(); ++i) {
      int events = 0;
      if (sides[i].sent < part) events |= POLLOUT;
      if (sides[i].received < part) events |= POLLIN;
      wanted[i] = {sides[i].socket, static_cast<short>(events), 0};
      open = open || events != 0;
    }
    if (!open) return;
    poll(wanted.data(), wanted.size(), -1);
    for (std::size_t i = 0; i < sides.size(); ++i) {
      Side& side = sides[i];
      if ((wanted[i].revents & POLLOUT) != 0) {
        const ssize_t n = send(side.socket, mine + side.sent, part - side.sent, MSG_DONTWAIT);
        if (n > 0) side.sent += static_cast<std::size_t>(n);
      }
      if ((wanted[i].revents & POLLIN) != 0) {
        const ssize_t n = recv(side.socket, all + part * side.from + side.received,
                               part - side.received, MSG_DONTWAIT);
        if (n > 0) side.received += static_cast<std::size_t>(n);
      }
    }
  }
}

struct Variant {
  std::string name;
  std::function<void()> run;
};

/// Of one rank and variant, in memory all ranks share.
struct Result {
  double seconds = 1e9, cpu = 1e9;
  std::int64_t wire = 1LL << 60;
};

void run_rank(const RankEnv& env, std::int64_t tile_bytes, int rounds, bool counted,
              const std::vector<int>& sockets, Result* results, std::vector<std::string>* names) {
  const auto ranks = connect_ranks(env);
  // c10d's own collectives, over a second store.
  c10d::TCPStoreOptions store_options;
  store_options.port = static_cast<std::uint16_t>(env.master_port + 1);
  store_options.isServer = env.rank == 0;
  store_options.waitWorkers = false;
  auto store = c10::make_intrusive<c10d::TCPStore>("127.0.0.1", store_options);
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
  const auto gloo =
      c10::make_intrusive<c10d::ProcessGroupGloo>(store, env.rank, env.world_size, options);

  const auto count = static_cast<std::size_t>(env.world_size);
  const auto part = static_cast<std::size_t>(tile_bytes) / count;
  const auto place = static_cast<std::size_t>(env.rank);
  std::vector<std::byte> all(part * count, std::byte(env.rank));
  std::vector<std::byte> mine(part, std::byte(env.rank));
  std::vector<float> gradients(part / 4 * count, 1), shard(part / 4);
  const auto bytes = [](std::span<std::byte> of) {
    return at::from_blob(of.data(), {static_cast<std::int64_t>(of.size())},
                         at::TensorOptions(at::kByte));
  };
  const auto floats = [](std::span<float> of) {
    return at::from_blob(of.data(), {static_cast<std::int64_t>(of.size())},
                         at::TensorOptions(at::kFloat));
  };
  const std::vector<Variant> variants = {
      {"bare sockets, all-gather", [&] { bare_all_gather(sockets, env.rank, all.data(), part); }},
      {"ranks, all-gather in place",
       [&] { ranks->all_gather(std::span(all).subspan(part * place, part), all); }},
      {"ranks, all-gather", [&] { ranks->all_gather(mine, all); }},
      {"gloo _allgather_base",
       [&] {
         at::Tensor out = bytes(all), in = bytes(mine);
         gloo->_allgather_base(out, in)->wait();
       }},
      {"gloo allgather into views",
       [&] {
         std::vector<std::vector<at::Tensor>> out(1);
         for (std::size_t r = 0; r < count; ++r) {
           out[0].push_back(bytes(std::span(all).subspan(part * r, part)));
         }
         std::vector<at::Tensor> in = {bytes(mine)};
         gloo->allgather(out, in)->wait();
       }},
      {"gloo alltoall_base (reduce-scatter's parts)",
       [&] {
         at::Tensor out = bytes(all), in = bytes(std::as_writable_bytes(std::span(gradients)));
         std::vector<std::int64_t> none;
         gloo->alltoall_base(out, in, none, none)->wait();
       }},
      {"ranks, reduce-scatter", [&] { ranks->reduce_scatter(gradients, shard); }},
      {"gloo _reduce_scatter_base",
       [&] {
         at::Tensor out = floats(shard), in = floats(gradients);
         gloo->_reduce_scatter_base(out, in)->wait();
       }},
      {"ranks, all-reduce of 8 doubles",
       [&] {
         std::vector<double> values(8);
         ranks->all_reduce(values, Reduce::sum);
       }},
      {"ranks, barrier", [&] { ranks->barrier(); }},
  };
  for (const Variant& variant : variants) names->push_back(variant.name);
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t v = 0; v < variants.size(); ++v) {
      ranks->barrier();
      const std::int64_t wire = counted ? wire_bytes() : 0;
      ranks->barrier();
      const double began = seconds_now(), cpu = processor_seconds();
      variants[v].run();
      Result& result = results[v];
      result.seconds = std::min(result.seconds, seconds_now() - began);
      result.cpu = std::min(result.cpu, processor_seconds() - cpu);
      ranks->barrier();
      if (counted) result.wire = std::min(result.wire, wire_bytes() - wire);
      ranks->barrier();
    }
  }
}

constexpr std::size_t kMostVariants = 16;

void measure(int count, std::int64_t tile_bytes, int rounds, bool counted) {
  const auto sockets = connect_all(count);
  const int port = free_port();
  const std::size_t bytes = sizeof(Result) * kMostVariants * static_cast<std::size_t>(count);
  auto* const results = static_cast<Result*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::uninitialized_fill_n(results, bytes / sizeof(Result), Result());
  std::fflush(stdout);
  std::vector<pid_t> children;
  for (int r = 0; r < count; ++r) {
    const pid_t child = fork();
    if (child > 0) {
      children.push_back(child);
      continue;
    }
    RankEnv env;
    env.rank = r;
    env.world_size = count;
    env.master_addr = "127.0.0.1";
    env.master_port = port;
    std::vector<std::string> names;
    try {
      Result* const own = results + kMostVariants * static_cast<std::size_t>(r);
      run_rank(env, tile_bytes, rounds, counted, sockets[static_cast<std::size_t>(r)], own, &names);
    } catch (const Error& error) {
      std::fputs(to_text(error).c_str(), stderr);
      _exit(1);
    }
    if (r == 0) {
      const double payload =
          static_cast<double>(tile_bytes) * (count - 1) / count * count;  // of all ranks
      std::printf("\n%d ranks, tile of %.0f MiB, %d rounds; payload of all ranks %.2f MB\n", count,
                  static_cast<double>(tile_bytes) / (1 << 20), rounds, payload / 1e6);
      std::printf("%-46s %9s %8s %9s %9s\n", "", "ms", "of bare", "CPU ms", "wire/payload");
      for (std::size_t v = 0; v < names.size(); ++v) {
        double seconds = 0, cpu = 0, bare = 0;
        std::int64_t wire = 1LL << 60;
        for (std::size_t q = 0; q < static_cast<std::size_t>(count); ++q) {
          const Result& of = results[kMostVariants * q + v];
          seconds = std::max(seconds, of.seconds);
          bare = std::max(bare, results[kMostVariants * q].seconds);
          cpu += of.cpu;
          wire = std::min(wire, of.wire);
        }
        std::printf("%-46s %9.3f %8.2f %9.2f", names[v].c_str(), 1e3 * seconds, bare / seconds,
                    1e3 * cpu);
        if (counted) std::printf(" %9.3f", static_cast<double>(wire) / payload);
        std::printf("\n");
      }
      std::fflush(stdout);
    }
    _exit(0);
  }
  for (const pid_t child : children) waitpid(child, nullptr, 0);
  for (const auto& row : sockets) {
    for (const int socket : row) {
      if (socket >= 0) close(socket);
    }
  }
  munmap(results, bytes);
}

}  // namespace
}  // namespace tailor

int main(int argc, char** argv) {
  const std::int64_t mebibytes = argc > 1 ? std::atoll(argv[1]) : 16;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 20;
  const bool counted = tailor::own_network();
  if (!counted) std::printf("no right to a network namespace: the wire is not counted\n");
  for (const int count : argc > 3 ? std::vector<int>{std::atoi(argv[3])} : std::vector<int>{2, 4}) {
    tailor::measure(count, mebibytes << 20, rounds, counted);
  }
}
