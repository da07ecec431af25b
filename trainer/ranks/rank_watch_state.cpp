#include "trainer/ranks/rank_watch_state.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <thread>

#include "base/rank_env.h"
#include "base/thread_name.h"

namespace tailor {
namespace {

constexpr double kTick_s = 0.05;

std::string key_of(int rank) { return "beat/" + std::to_string(rank); }

std::string short_seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

}  // namespace

std::string RankWatch::State::about(int r) {
  return peer_text(peer(r)) + "\nlast heard of " +
         short_seconds(std::max(0.0, seconds_now() - of(r).changed_at)) + " ago, in " +
         of(r).record.doing() + "\nseen by " + peer_text(peer(rank)) + ", in " + mine.doing();
}

void RankWatch::State::condemn(int who, Error::Parts parts) {
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

void RankWatch::State::condemn_store(const std::string& how) {
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
           kResumeMend});
  changed.notify_all();
}

void RankWatch::State::weigh(double now) {
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
                  about(r), kResumeMend});
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
                  about(r), kResumeMend});
    }
  }
}

bool RankWatch::State::waits_for_one_that_left(int r, double now) const {
  const double since_left = seen[static_cast<std::size_t>(r)].left_at;
  const double limit = std::min(options.timeout_s, 10.0);
  return std::any_of(calls.begin(), calls.end(), [&](const auto& call) {
    return call.second.peer == r && now - std::max(since_left, call.second.since) > limit;
  });
}

void RankWatch::State::condemn_failed(int r) {
  const RankRecord record = of(r).record;
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
    condemn(who, {record.words, about(who) + "\ntold by " + peer_text(peer(r)), kResumeMend});
  }
}

void RankWatch::State::read(const std::vector<std::string>& texts, double now) {
  for (int r = 0; r < count(); ++r) {
    if (texts[static_cast<std::size_t>(r)].empty()) continue;
    RankRecord record = RankRecord::read(texts[static_cast<std::size_t>(r)]);
    if (record.beats != of(r).record.beats || record.life != of(r).record.life) {
      of(r).changed_at = now;
    }
    of(r).record = std::move(record);
  }
}

void RankWatch::State::beat_until_stopped() {
  name_this_thread("rank-beat");
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

void RankWatch::State::judge_until_stopped() {
  name_this_thread("rank-judge");
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

}  // namespace tailor
