#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "trainer/ranks/rank_store.h"

namespace tailor {

struct WatchOptions {
  double timeout_s = 60;  ///< a rank that gave no sign of life for so long is dead
  /// One call of a communicator may take so long while every rank is alive; see also Patience.
  double collective_timeout_s = 1800;
  double leave_s = 10;  ///< after a death was found, this process ends itself if it still runs
  double beat_s = 1;    ///< between signs of life; at most an eighth of timeout_s is used
};

/// Sees to it that no rank waits for a dead one. Each rank has one: its threads tell the others
/// through the store that this rank lives, what it is doing and why it ended, and read the same of
/// them. A rank is dead when it reported a failure, when its connections closed and it is not heard
/// from, or when it gave no sign for `timeout_s`. Then calls of the communicators throw
/// Error{device} naming it, and if the process has not ended `leave_s` later, the watch prints that
/// error, writes torchrun's error file and ends the process with exit code 69.
class RankWatch {
 public:
  /// `store`: a connection of its own. Blocks no longer than a first word to the store takes.
  RankWatch(std::unique_ptr<RankStore> store, std::vector<RankPeer> peers, int rank,
            std::string place, bool keeps_store, bool agent_store, const WatchOptions& options);
  RankWatch(const RankWatch&) = delete;
  RankWatch& operator=(const RankWatch&) = delete;
  ~RankWatch();  ///< close()

  /// What this rank does, for the messages of the others: "step 12, forward".
  void set_phase(std::string text);
  /// This rank has done its work. Returns when all others have too, or have failed: whoever keeps
  /// the meeting point must not be the first to go.
  void leave() noexcept;
  /// Tells the others why this rank ends, and torchrun's agent. What comes after is this rank's own
  /// affair, within `leave_s`.
  void fail(const Error& reason) noexcept;

  /// Where neither leave() nor fail() was called: leave(), or, when an exception is on its way, a
  /// failure without words.
  void close() noexcept;

  /// Why the conversation is over, once it is.
  std::optional<Error> verdict() const;

  /// While it lives, calls of this process may take as long as they do, provided that all ranks
  /// live: for what others wait for while one prepares. `watch` may be nullptr.
  class Patience {
   public:
    explicit Patience(RankWatch* watch);
    Patience(const Patience&) = delete;
    Patience& operator=(const Patience&) = delete;
    ~Patience();

   private:
    RankWatch* watch_;
  };

  // --- For communicators ---

  /// How long a call may take now.
  double call_limit_s() const;

  /// Says what a call does while it waits.
  class Call {
   public:
    Call(RankWatch& watch, std::string text);
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call();
    /// It waits for this rank now.
    void wait_for(int peer);

   private:
    RankWatch& watch_;
    int id_ = 0;
  };
  /// `abort` is called once, from another thread, when a rank is found dead; it must not throw.
  /// Returns a number for forget(), after which it is not called and not running.
  int on_death(std::function<void()> abort);
  void forget(int id);
  /// Ranks::abort(): calls throw here, and soon elsewhere. fail() may still say why.
  void end_conversation() noexcept;
  /// The error of a call that was aborted, or whose connection to rank `suspect` broke with
  /// `fault`. Waits some beats for what the others have to say.
  Error explain(int suspect, const std::string& fault);
  /// `fault`, unless a rank is found dead within some beats: then that is why.
  Error explain(const Error& fault);
  /// The error of a call that took `collective_timeout_s`: what each rank is doing.
  Error too_slow(const std::string& call);

 private:
  struct State;
  std::shared_ptr<State> state_;
  std::thread judge_;
  int exceptions_ = 0;
};

/// Runs `body`; what it throws is told to the other ranks and thrown on. `watch` may be nullptr.
void with_watch(RankWatch* watch, const std::function<void()>& body);

}  // namespace tailor
