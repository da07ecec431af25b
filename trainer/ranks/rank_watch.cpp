#include "trainer/ranks/rank_watch.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr double kTick_s = 0.05;
constexpr const char* kMend =
    "See what that rank said last and what its host's log says (killed for want of memory?), then "
    "start again with --resume.";

std::string key_of(int rank) { return "beat/" + std::to_string(rank); }

/// alive; left: done, reads on until all are; gone: done and away; failed.
enum class Life { alive, left, gone, failed };

/// What a rank says of itself, over and over.
struct Record {
  std::int64_t beats = 0;
  Life life = Life::alive;
  std::string phase = "start";
  std::vector<std::string> calls;  ///< of its communicators, under way
  int exit_code = 0;               ///< failed: with what, whose fault, in which words
  int cause = -1;                  ///< a rank, itself when it failed by itself; -1: not known
  std::string words;

  std::string doing() const {
    std::string out = phase;
    for (const std::string& call : calls) out += (&call == calls.data() ? ": " : ", ") + call;
    return out;
  }
  std::string dump() const {
    return Json{{"beats", beats},    {"life", static_cast<int>(life)},
                {"phase", phase},    {"calls", calls},
                {"code", exit_code}, {"cause", cause},
                {"words", words}}
        .dump(-1, ' ', false, Json::error_handler_t::replace);
  }
  static Record read(const std::string& text) {
    const std::string where = "the meeting point of the ranks";
    const Json json = parse_json(text, where);
    const JsonReader read(json, where);
    Record out;
    out.beats = read.integer("beats");
    out.life = static_cast<Life>(std::clamp<std::int64_t>(read.integer("life"), 0, 3));
    out.phase = read.text("phase");
    for (const Json& call : read.at("calls")) out.calls.push_back(call.get<std::string>());
    out.exit_code = static_cast<int>(read.integer("code"));
    out.cause = static_cast<int>(read.integer("cause"));
    out.words = read.text("words");
    return out;
  }
};

std::string short_seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

}  // namespace

/// Shared by the threads: the beating one may be held up by a store that does not answer, and is
/// then left behind.
struct RankWatch::State : std::enable_shared_from_this<RankWatch::State> {
  struct Seen {
    Record record;
    double changed_at = 0;
    double failed_at = 0;  ///< first seen so; 0: not
    double left_at = 0;
  };
  using Lock = std::unique_lock<std::mutex>;

  // Fixed.
  WatchOptions options;
  std::vector<RankPeer> peers;
  int rank = 0;
  std::string place;
  bool keeps_store = false, agent_store = false;
  std::unique_ptr<RankStore> store;  ///< the beating thread's

  mutable std::mutex mutex;
  std::condition_variable changed;
  bool stop = false;                  ///< the owner is going
  bool beating = true;                ///< the beating thread runs
  bool asking = false;                ///< it waits for the store
  bool urgent = false;                ///< it should not wait for the next beat
  std::int64_t unanswered_ticks = 0;  ///< ticks and not seconds: a stopped process has none
  bool store_lost = false;

  Record mine;
  std::int64_t version = 1, published = 0;  ///< of `mine`: here, and in the store
  struct Waiting {
    std::string text;
    int peer = -1;     ///< waited for
    double since = 0;  ///< the wait for it began
  };
  std::map<int, Waiting> calls;
  int next_id = 0;
  std::vector<Seen> seen;
  std::set<int> suspects;

  std::optional<Error> verdict;
  int culprit = -1;
  std::int64_t ticks_since_verdict = 0;

  std::mutex abort_mutex;  ///< taken before `mutex`, never after it
  std::map<int, std::function<void()>> aborts;
  bool aborting = false;

  double beat_s() const { return std::min(options.beat_s, options.timeout_s / 8); }
  int count() const { return static_cast<int>(peers.size()); }
  const RankPeer& peer(int r) const { return peers[static_cast<std::size_t>(r)]; }
  Seen& of(int r) { return seen[static_cast<std::size_t>(r)]; }

  void changed_mine() {
    ++version;
    urgent = true;
    changed.notify_all();
  }
  void list_calls() {
    mine.calls.clear();
    for (const auto& [id, call] : calls) mine.calls.push_back(call.text);
  }
  template <class Test>
  bool all_others(const Test& test) {
    for (int r = 0; r < count(); ++r) {
      if (r != rank && !test(of(r).record)) return false;
    }
    return true;
  }
  std::string about(int r) {
    return peer_text(peer(r)) + "\nlast heard of " +
           short_seconds(std::max(0.0, seconds_now() - of(r).changed_at)) + " ago, in " +
           of(r).record.doing() + "\nseen by " + peer_text(peer(rank)) + ", in " + mine.doing();
  }

  /// The conversation is over: remembers why, tells the others with the next beat, and frees the
  /// threads that wait in communicators. The first verdict stands.
  void condemn(int who, Error::Parts parts) {
    if (verdict || mine.life == Life::left || mine.life == Life::gone) return;
    culprit = who;
    verdict.emplace(Fault::device, std::move(parts));
    if (mine.life == Life::alive) {
      mine.life = Life::failed;
      mine.exit_code = verdict->exit_code();
      mine.cause = who;
      mine.words = verdict->what();
    }
    changed_mine();
    // On a thread of its own: ending a communicator may itself be held up.
    std::thread([state = shared_from_this()] {
      const std::lock_guard lock(state->abort_mutex);
      state->aborting = true;
      for (const auto& [id, abort] : state->aborts) abort();
    }).detach();
  }
  void condemn_store(const std::string& how) {
    store_lost = true;
    const std::string keeper =
        agent_store   ? "the meeting point of the ranks, which torchrun's agent keeps, "
        : keeps_store ? "the meeting point of the ranks, which this rank keeps, "
                      : "rank 0, which keeps the meeting point, ";
    condemn(agent_store || keeps_store ? -1 : 0,
            {keeper + how,
             place + (agent_store || keeps_store
                          ? "\nseen by " + peer_text(peer(rank)) + ", in " + mine.doing()
                          : "\n" + about(0)),
             kMend});
    changed.notify_all();
  }

  /// What the beating thread has just read of the others.
  void weigh(double now) {
    for (int r = 0; r < count(); ++r) {
      if (r == rank || verdict) continue;
      Seen& other = of(r);
      const double silent = now - other.changed_at;
      if (other.record.life == Life::failed) {
        // One beat of grace: what failed there may fail here too, and has better words then.
        if (other.failed_at == 0) other.failed_at = now;
        if (now - other.failed_at >= beat_s()) condemn_failed(r);
      } else if (other.record.life == Life::alive && silent > options.timeout_s) {
        condemn(r, {"rank " + std::to_string(r) + " is dead: no sign of life for " +
                        short_seconds(silent),
                    about(r), kMend});
      } else if (other.record.life != Life::alive) {
        if (other.left_at == 0) other.left_at = now;
        if (waits_for_one_that_left(r, now)) {
          condemn(r, {"rank " + std::to_string(r) +
                          " left, as one that is done, while others still wait for it",
                      about(r),
                      "The ranks do not do the same work: start every one with the same "
                      "program, recipe and data."});
        }
      } else if (suspects.count(r) != 0 && silent > 2.5 * beat_s()) {
        condemn(r, {"rank " + std::to_string(r) +
                        " is dead: its connections closed and it is not heard of any more",
                    about(r), kMend});
      }
    }
  }
  /// A call that waits for a rank which is done: what that one sent before is on its way, no more.
  bool waits_for_one_that_left(int r, double now) const {
    const double since_left = seen[static_cast<std::size_t>(r)].left_at;
    const double limit = std::min(options.timeout_s, 10.0);
    return std::any_of(calls.begin(), calls.end(), [&](const auto& call) {
      return call.second.peer == r && now - std::max(since_left, call.second.since) > limit;
    });
  }
  void condemn_failed(int r) {
    const Record record = of(r).record;
    const bool by_itself = record.cause == r;
    if (record.cause == rank) {
      condemn(r, {"the other ranks gave this one up: " + record.words, about(r),
                  "If this process or its host was stopped for a while, start again with "
                  "--resume."});
    } else if (by_itself) {
      condemn(r, {"rank " + std::to_string(r) + " failed: " + record.words,
                  about(r) + "\nit ended with exit code " + std::to_string(record.exit_code),
                  "Mend what that rank names (its own output says more), then start again with "
                  "--resume."});
    } else {
      const int who = record.cause >= 0 && record.cause < count() ? record.cause : r;
      condemn(who, {record.words, about(who) + "\ntold by " + peer_text(peer(r)), kMend});
    }
  }

  void read(const std::vector<std::string>& texts, double now) {
    for (int r = 0; r < count(); ++r) {
      if (texts[static_cast<std::size_t>(r)].empty()) continue;
      Record record = Record::read(texts[static_cast<std::size_t>(r)]);
      if (record.beats != of(r).record.beats || record.life != of(r).record.life) {
        of(r).changed_at = now;
      }
      of(r).record = std::move(record);
    }
  }

  void beat_until_stopped() {
    std::vector<std::string> keys;
    for (int r = 0; r < count(); ++r) keys.push_back(key_of(r));
    Lock lock(mutex);
    bool all_spoke = false;
    while (true) {
      ++mine.beats;
      urgent = false;
      const std::int64_t version_now = version;
      const std::string word = mine.dump();
      const bool last = stop;
      asking = true;
      unanswered_ticks = 0;
      lock.unlock();
      std::string fault;
      std::vector<std::string> texts;
      try {
        store->set(keys[static_cast<std::size_t>(rank)], word);
        if (!last && all_spoke) texts = store->get(keys);
        if (!last && !all_spoke) {
          // A store makes a reader of a key that is not there wait.
          for (const std::string& key : keys) {
            texts.push_back(store->has(key) ? store->get({key})[0] : "");
          }
          all_spoke = std::find(texts.begin(), texts.end(), "") == texts.end();
        }
      } catch (const std::exception& error) {
        fault = error.what();
      }
      lock.lock();
      asking = false;
      if (!fault.empty()) {
        condemn_store("is gone");
        break;
      }
      published = version_now;
      if (last) break;
      try {
        const double now = seconds_now();
        read(texts, now);
        weigh(now);
      } catch (const std::exception& error) {
        condemn_store(std::string("holds no words of Tailor's: ") + error.what());
        break;
      }
      changed.notify_all();
      // Peers change their words once a beat; a suspicion is looked at more often.
      const bool near = !suspects.empty() || mine.life != Life::alive;
      changed.wait_for(lock, std::chrono::duration<double>(near ? beat_s() / 4 : beat_s()),
                       [&] { return urgent || stop; });
    }
    beating = false;
    changed.notify_all();
  }

  void judge_until_stopped() {
    const auto ticks = [](double seconds) { return static_cast<std::int64_t>(seconds / kTick_s); };
    Lock lock(mutex);
    while (!changed.wait_for(lock, std::chrono::duration<double>(kTick_s), [&] { return stop; })) {
      if (asking && ++unanswered_ticks > ticks(options.timeout_s) && !store_lost) {
        condemn_store("has not answered for " + short_seconds(options.timeout_s));
      }
      if (verdict && ++ticks_since_verdict > ticks(options.leave_s)) {
        write_error_file(*verdict);
        const std::string text = to_text(*verdict);
        (void)!write(STDERR_FILENO, text.data(), text.size());
        _exit(verdict->exit_code());
      }
    }
  }
};

RankWatch::RankWatch(std::unique_ptr<RankStore> store, std::vector<RankPeer> peers, int rank,
                     std::string place, bool keeps_store, bool agent_store,
                     const WatchOptions& options)
    : state_(std::make_shared<State>()), exceptions_(std::uncaught_exceptions()) {
  state_->store = std::move(store);
  state_->seen.resize(peers.size());
  state_->peers = std::move(peers);
  state_->rank = rank;
  state_->place = std::move(place);
  state_->keeps_store = keeps_store;
  state_->agent_store = agent_store;
  state_->options = options;
  for (State::Seen& other : state_->seen) other.changed_at = seconds_now();
  std::thread([state = state_] { state->beat_until_stopped(); }).detach();
  judge_ = std::thread([state = state_] { state->judge_until_stopped(); });
}

RankWatch::~RankWatch() {
  close();
  {
    State::Lock lock(state_->mutex);
    state_->stop = true;
    state_->changed.notify_all();
    // A store that does not answer may hold its thread; it is left behind with what it needs.
    state_->changed.wait_for(lock, std::chrono::seconds(1), [&] { return !state_->beating; });
  }
  judge_.join();
}

void RankWatch::close() noexcept {
  bool open = false;
  {
    const std::lock_guard lock(state_->mutex);
    open = state_->mine.life == Life::alive;
  }
  if (!open) return;
  if (std::uncaught_exceptions() == exceptions_) return leave();
  fail(Error(Fault::internal, {"it ended because of an error that its own output names", "", ""}));
}

void RankWatch::set_phase(std::string text) {
  const std::lock_guard lock(state_->mutex);
  state_->mine.phase = std::move(text);
}

void RankWatch::leave() noexcept {
  State::Lock lock(state_->mutex);
  if (state_->mine.life != Life::alive) return;
  state_->mine.life = Life::left;
  state_->changed_mine();
  const auto over = [&] { return state_->store_lost || !state_->beating || state_->verdict; };
  const auto limit = std::chrono::duration<double>(state_->options.collective_timeout_s);
  const auto silent = [&](const State::Seen& other) {
    return seconds_now() - other.changed_at > state_->options.timeout_s;
  };
  // Until all are done, however late: a rank that is slow in its last step needs the store.
  state_->changed.wait_for(lock, limit, [&] {
    if (over()) return true;
    for (int r = 0; r < state_->count(); ++r) {
      if (r != state_->rank && state_->of(r).record.life == Life::alive && !silent(state_->of(r))) {
        return false;
      }
    }
    return true;
  });
  if (!over()) {
    state_->mine.life = Life::gone;
    state_->changed_mine();
    const std::int64_t version = state_->version;
    state_->changed.wait_for(lock, std::chrono::seconds(2), [&] {
      if (over()) return true;
      return state_->keeps_store
                 ? state_->all_others([](const Record& r) { return r.life >= Life::gone; })
                 : state_->published >= version;
    });
  }
}

void RankWatch::fail(const Error& reason) noexcept {
  write_error_file(reason);
  State::Lock lock(state_->mutex);
  Record& mine = state_->mine;
  if (mine.life == Life::left || mine.life == Life::gone) return;
  if (!state_->verdict) {
    mine.life = Life::failed;
    mine.exit_code = reason.exit_code();
    mine.cause = state_->rank;
    mine.words = reason.what();
    state_->changed_mine();
  } else if (state_->culprit == state_->rank) {  // end_conversation() had no words
    mine.exit_code = reason.exit_code();
    mine.words = reason.what();
    state_->changed_mine();
  }
  const std::int64_t version = state_->version;
  const auto over = [&] { return state_->store_lost || !state_->beating; };
  state_->changed.wait_for(lock, std::chrono::seconds(2),
                           [&] { return over() || state_->published >= version; });
  if (!state_->keeps_store) return;
  // The others shall read why before the store goes with this process.
  const double limit = std::min(state_->options.leave_s / 2, 1 + 4 * state_->beat_s());
  state_->changed.wait_for(lock, std::chrono::duration<double>(limit), [&] {
    if (over()) return true;
    for (int r = 0; r < state_->count(); ++r) {
      if (r != state_->rank && r != state_->culprit && state_->of(r).record.life == Life::alive) {
        return false;
      }
    }
    return true;
  });
}

void RankWatch::end_conversation() noexcept {
  const State::Lock lock(state_->mutex);
  state_->condemn(state_->rank, {"this rank ended the conversation of the ranks",
                                 peer_text(state_->peer(state_->rank)),
                                 "What failed before says why; then start again with --resume."});
}

std::optional<Error> RankWatch::verdict() const {
  const std::lock_guard lock(state_->mutex);
  return state_->verdict;
}

RankWatch::Call::Call(RankWatch& watch, std::string text) : watch_(watch) {
  const std::lock_guard lock(watch_.state_->mutex);
  id_ = watch_.state_->next_id++;
  watch_.state_->calls[id_].text = std::move(text);
  watch_.state_->list_calls();
}

void RankWatch::Call::wait_for(int peer) {
  const std::lock_guard lock(watch_.state_->mutex);
  State::Waiting& call = watch_.state_->calls[id_];
  call.peer = peer;
  call.since = seconds_now();
}

RankWatch::Call::~Call() {
  const std::lock_guard lock(watch_.state_->mutex);
  watch_.state_->calls.erase(id_);
  watch_.state_->list_calls();
}

int RankWatch::on_death(std::function<void()> abort) {
  const std::lock_guard lock(state_->abort_mutex);
  if (state_->aborting) abort();
  const std::lock_guard state_lock(state_->mutex);
  const int id = state_->next_id++;
  state_->aborts[id] = std::move(abort);
  return id;
}

void RankWatch::forget(int id) {
  const std::lock_guard lock(state_->abort_mutex);
  state_->aborts.erase(id);
}

Error RankWatch::explain(int suspect, const std::string& fault) {
  State::Lock lock(state_->mutex);
  if (suspect >= 0) state_->suspects.insert(suspect);
  state_->urgent = true;
  state_->changed.notify_all();
  const double limit = 1 + 5 * state_->beat_s();
  state_->changed.wait_for(lock, std::chrono::duration<double>(limit),
                           [&] { return state_->verdict.has_value() || !state_->beating; });
  if (!state_->verdict) {
    const std::string who = suspect < 0 ? "the other ranks" : "rank " + std::to_string(suspect);
    state_->condemn(suspect,
                    {"the connection to " + who + " broke, although it is alive: " + fault,
                     suspect < 0 ? state_->place : state_->about(suspect),
                     "Check the network between the two hosts (GLOO_SOCKET_IFNAME chooses the "
                     "interface), then start again with --resume."});
  }
  // Nothing was judged of a rank that already left.
  return state_->verdict.value_or(Error(
      Fault::device, {"the conversation of the ranks broke: " + fault, state_->place, kMend}));
}

Error RankWatch::explain(const Error& fault) {
  State::Lock lock(state_->mutex);
  for (int r = 0; r < state_->count(); ++r) {
    if (r != state_->rank) state_->suspects.insert(r);
  }
  state_->urgent = true;
  state_->changed.notify_all();
  state_->changed.wait_for(lock, std::chrono::duration<double>(1 + 5 * state_->beat_s()),
                           [&] { return state_->verdict.has_value() || !state_->beating; });
  return state_->verdict.value_or(fault);
}

Error RankWatch::too_slow(const std::string& call) {
  State::Lock lock(state_->mutex);
  std::string where;
  for (int r = 0; r < state_->count(); ++r) {
    where += (r == 0 ? "" : "\n") + peer_text(state_->peer(r)) + ": " +
             (r == state_->rank ? state_->mine : state_->of(r).record).doing();
  }
  state_->condemn(-1,
                  {call + " took more than " + seconds_text(state_->options.collective_timeout_s) +
                       " although all ranks are alive",
                   where,
                   "See which rank does something else than the others, or is very slow. If "
                   "that is as it should be, allow more time."});
  return *state_->verdict;
}

const WatchOptions& RankWatch::options() const { return state_->options; }

void with_watch(RankWatch* watch, const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    if (watch != nullptr) watch->fail(error);
    throw;
  } catch (const std::exception& error) {
    if (watch != nullptr) watch->fail(Error(Fault::internal, {error.what(), "", ""}));
    throw;
  }
  if (watch != nullptr) watch->leave();
}

}  // namespace tailor
