#include "trainer/ranks/meeting_socket.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/error.h"

namespace tailor {
namespace {

/// An open file descriptor.
class Socket {
 public:
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  Socket& operator=(Socket&&) = delete;
  ~Socket() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  int get() const { return descriptor_; }
  int release() { return std::exchange(descriptor_, -1); }

 private:
  int descriptor_;
};

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

/// Empty with `why` set when the name is not known.
AddressList resolve(const std::string& host, int port, int flags, std::string& why) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const int fault = getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(port).c_str(),
                                &hints, &found);
  if (fault != 0) {
    why = "the name '" + host + "' is not known here (" + gai_strerror(fault) + ")";
    found = nullptr;
  }
  return {found, &freeaddrinfo};
}

std::string address_text(const sockaddr* address, socklen_t length) {
  char host[NI_MAXHOST] = "";
  getnameinfo(address, length, host, sizeof host, nullptr, 0, NI_NUMERICHOST);
  return host;
}

}  // namespace

bool is_loopback(const std::string& address) {
  return address == "localhost" || address == "::1" || address.starts_with("127.");
}

std::string own_address_toward(const std::string& host, int port) {
  std::string why;
  const AddressList found = resolve(host, port, 0, why);
  for (const addrinfo* at = found.get(); at != nullptr; at = at->ai_next) {
    const Socket socket(::socket(at->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (socket.get() < 0 || connect(socket.get(), at->ai_addr, at->ai_addrlen) != 0) continue;
    sockaddr_storage own{};
    socklen_t length = sizeof own;
    if (getsockname(socket.get(), reinterpret_cast<sockaddr*>(&own), &length) != 0) continue;
    return address_text(reinterpret_cast<const sockaddr*>(&own), length);
  }
  return {};
}

bool answers(const std::string& host, int port, int wait_ms, std::string& why) {
  const AddressList found = resolve(host, port, 0, why);
  for (const addrinfo* at = found.get(); at != nullptr; at = at->ai_next) {
    const Socket socket(::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (socket.get() < 0) continue;
    int fault = 0;
    if (connect(socket.get(), at->ai_addr, at->ai_addrlen) != 0) {
      fault = errno;
      if (fault == EINPROGRESS) {
        pollfd wait{socket.get(), POLLOUT, 0};
        socklen_t length = sizeof fault;
        fault = ETIMEDOUT;
        if (poll(&wait, 1, wait_ms) > 0) {
          getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &fault, &length);
        }
      }
    }
    if (fault == 0) return true;
    why = std::strerror(fault);
  }
  return false;
}

std::string place_of(const RankEnv& env) {
  const bool v6 = env.master_addr.find(':') != std::string::npos;
  return (v6 ? "[" + env.master_addr + "]" : env.master_addr) + ":" +
         std::to_string(env.master_port);
}

int listen_at(const RankEnv& env) {
  const bool here = is_loopback(env.master_addr);
  const bool v4 = env.master_addr.starts_with("127.") || env.master_addr == "localhost";
  int fault = 0;
  // All addresses: IPv6's also takes IPv4, where the machine has IPv6.
  const std::vector<std::string> tried = here ? std::vector<std::string>{v4 ? "127.0.0.1" : "::1"}
                                              : std::vector<std::string>{"::", "0.0.0.0"};
  for (const std::string& address : tried) {
    std::string why;
    const AddressList found = resolve(address, env.master_port, AI_PASSIVE | AI_NUMERICHOST, why);
    if (!found) continue;
    Socket socket(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int on = 1, off = 0;
    if (socket.get() < 0) continue;
    setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address == "::") setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(socket.get(), found->ai_addr, found->ai_addrlen) == 0 &&
        listen(socket.get(), SOMAXCONN) == 0) {
      return socket.release();
    }
    fault = errno;
    if (fault == EADDRINUSE) break;
  }
  const std::string port = std::to_string(env.master_port);
  throw Error(
      Fault::device,
      {"rank 0 cannot open the meeting point: " +
           (fault == EADDRINUSE ? "port " + port + " is in use by another program"
                                : "port " + port + ": " + std::strerror(fault)),
       place_of(env) + " (MASTER_ADDR, MASTER_PORT)",
       "Set MASTER_PORT to a free port for all ranks, or end who holds it (`ss -ltnp 'sport = " +
           port + "'`): an earlier run may still be alive."});
}

}  // namespace tailor
