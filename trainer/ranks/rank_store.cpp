#include "trainer/ranks/rank_store.h"

#include <arpa/inet.h>
#include <c10/util/Logging.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <future>
#include <thread>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "trainer/ranks/c10d_store.h"

namespace tailor {
namespace {

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

class C10dStore final : public RankStore {
 public:
  C10dStore(c10::intrusive_ptr<c10d::TCPStore> connection, std::string prefix, std::string place)
      : connection_(std::move(connection)),
        prefix_(std::move(prefix)),
        place_(std::move(place)),
        keys_(c10::make_intrusive<c10d::PrefixStore>(prefix_, connection_)) {}

  void set(const std::string& key, const std::string& text) override {
    asked([&] { keys_->set(key, std::vector<std::uint8_t>(text.begin(), text.end())); });
  }
  std::vector<std::string> get(const std::vector<std::string>& keys) override {
    std::vector<std::string> out;
    asked([&] {
      for (const auto& value : keys_->multiGet(keys)) out.emplace_back(value.begin(), value.end());
    });
    return out;
  }
  bool has(const std::string& key) override {
    bool out = false;
    asked([&] { out = keys_->check({key}); });
    return out;
  }
  std::int64_t add(const std::string& key, std::int64_t amount) override {
    std::int64_t out = 0;
    asked([&] { out = keys_->add(key, amount); });
    return out;
  }
  std::unique_ptr<RankStore> connect_again() override {
    c10::intrusive_ptr<c10d::TCPStore> other;
    asked([&] {
      c10d::TCPStoreOptions options;
      options.port = connection_->getPort();
      options.timeout = connection_->getTimeout();
      other = c10::make_intrusive<c10d::TCPStore>(connection_->getHost(), options);
    });
    return std::make_unique<C10dStore>(other, prefix_, place_);
  }

  const c10::intrusive_ptr<c10d::Store>& c10d() const { return keys_; }

 private:
  template <class Call>
  void asked(const Call& call) {
    try {
      call();
    } catch (const std::exception& fault) {
      throw Error(Fault::device,
                  {"the meeting point of the ranks is gone: " + first_line(fault.what()), place_,
                   "Look for the first failure among the ranks, then start again with --resume."});
    }
  }

  c10::intrusive_ptr<c10d::TCPStore> connection_;
  std::string prefix_, place_;
  c10::intrusive_ptr<c10d::Store> keys_;
};

/// Runs `work` on a thread of its own and waits for it no longer than `seconds`: c10d's client
/// reads without a limit, and whoever listens at that address may never answer. A thread left
/// behind waits on a socket of its own, and the process is about to end.
template <class Result>
std::optional<Result> within(double seconds, std::function<Result()> work) {
  auto task = std::make_shared<std::packaged_task<Result()>>(std::move(work));
  std::future<Result> result = task->get_future();
  std::thread([task] { (*task)(); }).detach();
  if (result.wait_for(std::chrono::duration<double>(seconds)) != std::future_status::ready) {
    return std::nullopt;
  }
  return result.get();
}

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

bool is_loopback(const std::string& address) {
  return address == "localhost" || address == "::1" || address.starts_with("127.");
}

/// This machine's own address on the way to `host`: what a datagram to it would carry. Nothing is
/// sent. Empty when there is no way.
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

/// Whether something takes connections there; `why` says what stood in the way.
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

/// Rank 0's listening socket. Where MASTER_ADDR is this machine alone, nobody else can come in.
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

/// Waits, telling the person what for.
class Patience {
 public:
  Patience(double limit_s, double notice_s)
      : began_(seconds_now()), limit_(limit_s), notice_(notice_s), next_(notice_s) {}
  double waited() const { return seconds_now() - began_; }
  double left() const { return std::max(0.0, limit_ - waited()); }
  bool over() const { return left() == 0; }
  void pause(const std::string& what) {
    if (waited() >= next_) {
      log_info("waiting for " + what + " (" + seconds_text(left()) + " left)");
      next_ = std::max(2 * next_, waited());
    }
    std::this_thread::sleep_for(std::chrono::duration<double>(std::min(0.05, notice_)));
  }

 private:
  double began_, limit_, notice_, next_;
};

Error unreachable(const RankEnv& env, double waited, const std::string& why) {
  const std::string port = std::to_string(env.master_port);
  return {Fault::device,
          {"rank " + std::to_string(env.rank) + " cannot reach rank 0 at " + place_of(env) +
               " within " + seconds_text(waited) + ": " + why,
           "MASTER_ADDR=" + env.master_addr + ", MASTER_PORT=" + port,
           "Check that rank 0 was started and still runs (its own message tells), that MASTER_ADDR "
           "names its node as this one sees it (`getent hosts " +
               env.master_addr + "`), and that no firewall blocks port " + port + " (`nc -vz " +
               env.master_addr + " " + port + "`)."}};
}

Error foreign(const RankEnv& env, const std::string& found) {
  return {Fault::usage,
          {"what answers at " + place_of(env) + " is not this run's meeting point: " + found,
           "MASTER_ADDR=" + env.master_addr + ", MASTER_PORT=" + std::to_string(env.master_port),
           "End what is left of an earlier run, or set MASTER_PORT to a free port for all ranks."}};
}

c10::intrusive_ptr<c10d::TCPStore> open_store(const RankEnv& env, const MeetOptions& options) {
  c10d::TCPStoreOptions store;
  store.port = static_cast<std::uint16_t>(env.master_port);
  store.isServer = env.rank == 0 && !env.agent_store;
  store.waitWorkers = false;
  store.timeout = std::chrono::milliseconds(
      static_cast<std::int64_t>(1000 * std::max(1.0, options.connect_timeout_s)));
  Patience patience(options.connect_timeout_s, options.notice_s);
  if (store.isServer) {
    store.masterListenFd = listen_at(env);
  } else {
    std::string why;
    while (!answers(env.master_addr, env.master_port, 1000, why)) {
      if (patience.over()) throw unreachable(env, options.connect_timeout_s, why);
      patience.pause("rank 0 at " + place_of(env) + ": " + why);
    }
  }
  // The server's own client goes the short way: MASTER_ADDR may be known to the others only.
  const std::string host = !store.isServer                                  ? env.master_addr
                           : env.master_addr.find(':') != std::string::npos ? "::1"
                                                                            : "127.0.0.1";
  using Store = c10::intrusive_ptr<c10d::TCPStore>;
  try {
    const auto opened = within<Store>(
        patience.left() + 1, [=] { return c10::make_intrusive<c10d::TCPStore>(host, store); });
    if (opened) return *opened;
  } catch (const std::exception& fault) {
    throw foreign(env, first_line(fault.what()));
  }
  throw foreign(env, "it takes connections and says nothing");
}

Json to_json(const RankPeer& peer) {
  return {{"rank", peer.rank},
          {"world_size", peer.world_size},
          {"local_world_size", peer.local_world_size},
          {"host", peer.host},
          {"address", peer.address},
          {"pid", peer.pid}};
}

RankPeer peer_from(const std::string& text) {
  const Json json = parse_json(text, "the meeting point of the ranks");
  const JsonReader read(json, "the meeting point of the ranks");
  RankPeer out;
  out.rank = static_cast<int>(read.integer("rank"));
  out.world_size = static_cast<int>(read.integer("world_size"));
  out.local_world_size = static_cast<int>(read.integer("local_world_size"));
  out.host = read.text("host");
  out.address = read.text("address");
  out.pid = read.integer("pid");
  return out;
}

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

void require_size(const RankPeer& one, const RankPeer& other) {
  if (one.world_size == other.world_size) return;
  const auto of = [](const RankPeer& peer) {
    return "rank " + std::to_string(peer.rank) +
           " with WORLD_SIZE=" + std::to_string(peer.world_size);
  };
  throw Error(Fault::usage,
              {"the ranks do not agree on their number: " + of(one) + ", " + of(other),
               peer_text(one) + "\n" + peer_text(other),
               "Start all ranks with one WORLD_SIZE. If one of them is left from an earlier run, "
               "end it or choose another MASTER_PORT."});
}

}  // namespace

c10::intrusive_ptr<c10d::Store> c10d_store(RankStore& store) {
  auto* const ours = dynamic_cast<C10dStore*>(&store);
  TAILOR_CHECK(ours != nullptr, "not a store of meet_ranks()");
  return ours->c10d();
}

RankMeeting meet_ranks(const RankEnv& env, const MeetOptions& options) {
  // c10d's store writes to sockets that may have closed; its errors are for us, not the signal.
  struct sigaction pipe {};
  if (sigaction(SIGPIPE, nullptr, &pipe) == 0 && pipe.sa_handler == SIG_DFL) {
    signal(SIGPIPE, SIG_IGN);
  }
  // c10d prints a stack trace for each connection that fails; what matters of it is in our errors.
  if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = c10::GLOG_FATAL;
  RankMeeting out;
  out.place = place_of(env);
  out.agent_store = env.agent_store;
  const auto connection = open_store(env, options);
  out.keeps_store = env.rank == 0 && !env.agent_store;

  RankPeer me;
  me.rank = env.rank;
  me.world_size = env.world_size;
  me.local_world_size = env.local_world_size;
  me.host = host_name();
  me.address = own_address_toward(env.master_addr, env.master_port);
  me.pid = getpid();

  // Attempts share the agent's store, and a port may be taken over by the next run of another job.
  const std::string prefix = "tailor " + env.job;
  // What rank 0 says stands under a key that all runs know, so that a wrong one is told at once.
  const std::string identity = env.agent_store ? prefix + "/first" : "tailor first";
  Patience patience(options.join_timeout_s, options.notice_s);
  const auto bytes = [](const std::string& text) {
    return std::vector<std::uint8_t>(text.begin(), text.end());
  };

  // All of the talk runs beside this thread: rank 0 may be stopped in the middle of it.
  struct Progress {
    std::mutex mutex;
    std::string waiting_for = "the meeting point";
  };
  const auto progress = std::make_shared<Progress>();
  const auto now_waiting_for = [progress](std::string what) {
    const std::lock_guard lock(progress->mutex);
    progress->waiting_for = std::move(what);
  };
  const double connect_limit = options.connect_timeout_s;
  const auto talk = [=]() -> std::vector<RankPeer> {
    auto store = C10dStore(connection, prefix, place_of(env));
    const Patience connect(connect_limit, 1);
    RankPeer rank_0 = me;
    const auto rest = [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
    if (env.rank == 0) {
      connection->set(identity, bytes(Json{{"job", env.job}, {"peer", to_json(me)}}.dump()));
    } else {
      now_waiting_for("rank 0's word at " + place_of(env));
      while (!connection->check({identity})) {
        // torchrun's agent is there before any rank is; rank 0's own store comes with its word.
        if (env.agent_store ? patience.over() : connect.over()) {
          throw env.agent_store
              ? unreachable(env, options.join_timeout_s, "rank 0 has not come to the agent's store")
              : foreign(env, "a store of another program, without a word of Tailor's rank 0");
        }
        rest();
      }
      const auto word = connection->get(identity);
      const Json first =
          parse_json(std::string(word.begin(), word.end()), "the meeting point of the ranks");
      const std::string job = JsonReader(first, "the meeting point of the ranks").text("job");
      if (job != env.job)
        throw foreign(env, "it belongs to job '" + job + "', this is '" + env.job + "'");
      rank_0 = peer_from(first.at("peer").dump());
    }
    const std::string mine = "rank/" + std::to_string(env.rank);
    if (store.add("came/" + std::to_string(env.rank), 1) != 1) {
      std::string who = "another process";
      if (store.has(mine)) who = peer_text(peer_from(store.get({mine})[0]));
      throw foreign(env, who + " is rank " + std::to_string(env.rank) +
                             " there already: two processes have the same RANK, or an earlier run "
                             "is still alive");
    }
    store.set(mine, to_json(me).dump());  // also when it is refused: the others shall see why
    require_size(rank_0, me);

    std::vector<RankPeer> peers;
    for (int r = 0; r < env.world_size; ++r) {
      const std::string key = "rank/" + std::to_string(r);
      while (!store.has(key)) {
        std::string missing;
        int absent = 0;
        for (int other = r; other < env.world_size && absent < 9; ++other) {
          if (store.has("rank/" + std::to_string(other))) continue;
          if (absent > 0) missing += ", ";
          missing += ++absent == 9 ? "..." : std::to_string(other);
        }
        if (absent == 0) break;
        missing = "rank" + std::string(absent == 1 ? " " : "s ") + missing + " of " +
                  std::to_string(env.world_size) + " to come to " + place_of(env);
        now_waiting_for(missing);
        if (patience.over()) {
          throw Error(
              Fault::device,
              {"waited " + seconds_text(options.join_timeout_s) + " for " + missing, peer_text(me),
               "Look at what those ranks said, if they were started: each must reach this "
               "address. Start all of them again."});
        }
        rest();
      }
      peers.push_back(peer_from(store.get({key})[0]));
      require_size(peers.back(), me);
    }
    return peers;
  };

  auto task = std::make_shared<std::packaged_task<std::vector<RankPeer>()>>(talk);
  std::future<std::vector<RankPeer>> peers = task->get_future();
  std::thread([task] { (*task)(); }).detach();
  // The talk keeps its own limits; past them, a store that stopped answering holds it up.
  while (peers.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready) {
    std::string what;
    {
      const std::lock_guard lock(progress->mutex);
      what = progress->waiting_for;
    }
    if (patience.waited() > options.join_timeout_s + 5) {
      throw unreachable(env, patience.waited(), "the meeting point stopped answering");
    }
    patience.pause(what);
  }
  out.peers = peers.get();

  // A MASTER_ADDR that is its own node's loopback name (Debian's 127.0.1.1) leads rank 0 nowhere:
  // then the way to a rank of another host does.
  RankPeer& own = out.peers[static_cast<std::size_t>(env.rank)];
  if (is_loopback(own.address)) {
    for (const RankPeer& peer : out.peers) {
      if (peer.host == own.host || is_loopback(peer.address)) continue;
      own.address = own_address_toward(peer.address, env.master_port);
      break;
    }
  }
  out.store = std::make_unique<C10dStore>(connection, prefix, out.place);
  return out;
}

}  // namespace tailor
