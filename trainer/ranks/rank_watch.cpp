#include "trainer/ranks/rank_watch.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>

#include "base/rank_env.h"
#include "base/text.h"
#include "trainer/ranks/rank_watch_state.h"

namespace tailor {

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
                 ? state_->all_others([](const RankRecord& r) { return r.life >= Life::gone; })
                 : state_->published >= version;
    });
  }
}

void RankWatch::fail(const Error& reason) noexcept {
  write_error_file(reason);
  State::Lock lock(state_->mutex);
  RankRecord& mine = state_->mine;
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
  return state_->verdict.value_or(
      Error(Fault::device,
            {"the conversation of the ranks broke: " + fault, state_->place, kResumeMend}));
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
                   "that is as it should be, allow more: TAILOR_COLLECTIVE_TIMEOUT=SECONDS."});
  return *state_->verdict;
}

RankWatch::Patience::Patience(RankWatch* watch) : watch_(watch) {
  if (watch_ != nullptr) ++watch_->state_->patient;
}

RankWatch::Patience::~Patience() {
  if (watch_ != nullptr) --watch_->state_->patient;
}

double RankWatch::call_limit_s() const {
  constexpr double kMonth_s = 30 * 86'400.0;
  return state_->patient > 0 ? kMonth_s : state_->options.collective_timeout_s;
}

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
