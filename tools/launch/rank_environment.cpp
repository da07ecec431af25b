#include "tools/launch/rank_environment.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace tailor {
namespace {

constexpr std::array<std::string_view, 7> kNames = {
    "RANK",        "WORLD_SIZE",  "LOCAL_RANK",     "LOCAL_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"};
constexpr std::array<std::string_view, 4> kForeign = {"TORCHELASTIC_", "PET_", "GROUP_", "ROLE_"};

bool replaced(std::string_view entry, bool threads) {
  const std::string_view name = entry.substr(0, entry.find('='));
  if (name == "OMP_NUM_THREADS") return threads;
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end() ||
         std::any_of(kForeign.begin(), kForeign.end(),
                     [&](std::string_view beginning) { return name.starts_with(beginning); });
}

}  // namespace

std::vector<std::string> rank_environment(const RankPlace& place,
                                          std::span<const std::string> before) {
  std::vector<std::string> out;
  for (const std::string& entry : before) {
    if (!replaced(entry, place.threads > 0)) out.push_back(entry);
  }
  const auto set = [&](std::string_view name, const std::string& value) {
    out.push_back(std::string(name) + "=" + value);
  };
  set("RANK", std::to_string(place.rank));
  set("WORLD_SIZE", std::to_string(place.world_size));
  set("LOCAL_RANK", std::to_string(place.local_rank));
  set("LOCAL_WORLD_SIZE", std::to_string(place.local_world_size));
  set("MASTER_ADDR", place.master_addr);
  set("MASTER_PORT", std::to_string(place.master_port));
  if (place.threads > 0) set("OMP_NUM_THREADS", std::to_string(place.threads));
  return out;
}

int slurm_port(std::int64_t job, std::int64_t restarts) {
  return static_cast<int>(20000 + (job * 8 + restarts) % 12000);
}

std::string first_host(std::string_view list) {
  const auto refuse = [&] {
    return Error(Fault::usage, {"'" + std::string(list) + "' is no list of hosts",
                                "SLURM_STEP_NODELIST", "Start the ranks with srun or torchrun."});
  };
  std::string host;
  std::size_t at = 0;
  while (at < list.size() && list[at] != ',') {
    if (list[at] != '[') {
      host += list[at++];
      continue;
    }
    const std::size_t close = list.find(']', at);
    if (close == std::string_view::npos) throw refuse();
    const std::string_view inside = list.substr(at + 1, close - at - 1);
    const std::string_view first = inside.substr(0, inside.find_first_of("-,"));
    if (first.empty()) throw refuse();
    host += first;
    at = close + 1;
  }
  if (host.empty()) throw refuse();
  return host;
}

std::optional<RankPlace> slurm_place(
    const std::function<std::string(const std::string&)>& value_of) {
  const auto number = [&](const std::string& name, bool needed) -> std::int64_t {
    const std::string text = value_of(name);
    if (text.empty() && !needed) return 0;
    std::int64_t out = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
    if (error != std::errc() || end != text.data() + text.size() || out < 0) {
      throw Error(Fault::usage,
                  {name + " is '" + text + "', needed: a whole number", "the environment srun made",
                   "Start the ranks with srun or torchrun."});
    }
    return out;
  };
  const auto tasks = static_cast<int>(number("SLURM_STEP_NUM_TASKS", false));
  if (tasks < 2) return std::nullopt;
  RankPlace place;
  place.world_size = tasks;
  place.rank = static_cast<int>(number("SLURM_PROCID", true));
  place.local_rank = static_cast<int>(number("SLURM_LOCALID", true));
  // The tasks on this node, by rank: SLURM_GTIDS, "2,3".
  const std::string here = value_of("SLURM_GTIDS");
  place.local_world_size = static_cast<int>(1 + std::count(here.begin(), here.end(), ','));
  place.master_addr = first_host(value_of("SLURM_STEP_NODELIST"));
  place.master_port =
      slurm_port(number("SLURM_JOB_ID", true), number("SLURM_RESTART_COUNT", false));
  return place;
}

LauncherFacts launcher_facts(const std::function<std::string(const std::string&)>& value_of) {
  if (const std::string own = value_of("TAILOR_LAUNCHER"); !own.empty()) {
    return {own, value_of("TAILOR_LAUNCHER_JOB")};
  }
  for (const auto& [variable, launcher] :
       {std::pair{"SLURM_JOB_ID", "slurm"}, std::pair{"SKYPILOT_TASK_ID", "skypilot"},
        std::pair{"TORCHELASTIC_RUN_ID", "torchrun"}}) {
    if (const std::string job = value_of(variable); !job.empty()) return {launcher, job};
  }
  if (!value_of("KUBERNETES_SERVICE_HOST").empty()) return {"kubernetes", value_of("HOSTNAME")};
  return {};
}

std::string environment_value(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? "" : value;
}

std::vector<std::string> own_environment() {
  std::vector<std::string> out;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    out.emplace_back(*entry);
  }
  return out;
}

ReservedPort::ReservedPort() : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  const auto fail = [&](const char* doing) {
    const Error error = io_error(errno, doing, "127.0.0.1, for the ranks to meet at");
    if (socket_ >= 0) ::close(socket_);
    throw Error(error);
  };
  if (socket_ < 0) fail("cannot make a socket");
  const int on = 1;
  ::setsockopt(socket_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::bind(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    fail("no port is free");
  }
  socklen_t size = sizeof address;
  if (::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    fail("cannot learn the port");
  }
  number_ = ntohs(address.sin_port);
}

ReservedPort::~ReservedPort() { ::close(socket_); }

}  // namespace tailor
