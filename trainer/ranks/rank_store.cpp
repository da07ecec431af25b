#include "trainer/ranks/rank_store.h"

#include <c10/util/Logging.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <future>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "trainer/ranks/c10d_store.h"
#include "trainer/ranks/meeting_socket.h"

namespace tailor {
namespace {

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

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace

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
    const auto own = rank_store(connection, prefix, place_of(env));
    RankStore& store = *own;
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
  out.store = rank_store(connection, prefix, out.place);
  return out;
}

}  // namespace tailor
