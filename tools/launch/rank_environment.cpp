#include "tools/launch/rank_environment.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
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
