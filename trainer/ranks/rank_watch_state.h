#pragma once

// For rank_watch*.cpp only.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "trainer/ranks/rank_record.h"
#include "trainer/ranks/rank_watch.h"

namespace tailor {

constexpr const char* kResumeMend =
    "See what that rank said last and what its host's log says (killed for want of memory?), then "
    "start again with --resume.";

/// Shared by the threads: the beating one may be held up by a store that does not answer, and is
/// then left behind.
struct RankWatch::State : std::enable_shared_from_this<RankWatch::State> {
  struct Seen {
    RankRecord record;
    double changed_at = 0;
    double failed_at = 0;  ///< first seen so; 0: not
    double left_at = 0;
  };
  using Lock = std::unique_lock<std::mutex>;

  // Fixed.
  WatchOptions options;
  std::atomic<int> patient = 0;
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

  RankRecord mine;
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
  std::string about(int r);

  /// The conversation is over: remembers why, tells the others with the next beat, and frees the
  /// threads that wait in communicators. The first verdict stands.
  void condemn(int who, Error::Parts parts);
  void condemn_store(const std::string& how);

  /// What the beating thread has just read of the others.
  void weigh(double now);
  /// A call that waits for a rank which is done: what that one sent before is on its way, no more.
  bool waits_for_one_that_left(int r, double now) const;
  void condemn_failed(int r);

  void read(const std::vector<std::string>& texts, double now);

  void beat_until_stopped();

  void judge_until_stopped();
};

}  // namespace tailor
