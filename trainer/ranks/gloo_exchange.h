#pragma once

// For the .cpp files that see c10d only.

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <vector>

#include "trainer/ranks/rank_peer.h"
#include "trainer/ranks/rank_store.h"
#include "trainer/ranks/rank_watch.h"

namespace tailor {

/// What all communicators of a process share.
struct GlooShared {
  std::unique_ptr<RankStore> store;
  std::vector<RankPeer> peers;
  std::unique_ptr<RankWatch> watch;
  double connect_timeout_s = 30;
};

/// Sends and receives between pairs of ranks over a Gloo group of its own. A wait can be ended from
/// another thread, and what c10d throws becomes what the watch knows.
class GlooExchange {
 public:
  struct Piece {
    int peer;          ///< its place among the members
    const void* data;  ///< written to where it is received
    std::size_t bytes;
  };

  /// Connects `members`, ranks of the run, of which this process is members[place]. Collective;
  /// throws Error{device}. No group where a rank is alone.
  GlooExchange(std::shared_ptr<GlooShared> shared, const std::string& prefix,
               std::vector<int> members, int place);
  GlooExchange(const GlooExchange&) = delete;
  GlooExchange& operator=(const GlooExchange&) = delete;

  /// Sends and receives at once; `received` is called in the order of `receives`. Returns when all
  /// are done. Empty pieces are skipped: both sides know their size. `call` says what is waited
  /// for, `doing` what the call is, in messages.
  void exchange(RankWatch::Call& call, const std::string& doing, const std::vector<Piece>& sends,
                const std::vector<Piece>& receives,
                const std::function<void(std::size_t)>& received = {});
  /// Calls under way and later ones throw. Any thread.
  void end_calls() noexcept;

 private:
  using WorkPointer = c10::intrusive_ptr<c10d::Work>;
  struct InFlight;

  RankWatch& watch() const { return *shared_->watch; }
  int rank_of(int peer) const { return members_[static_cast<std::size_t>(peer)]; }
  void wait(RankWatch::Call& call, const std::string& doing, const WorkPointer& work, int peer);
  template <class Body>
  void guarded(const std::string& doing, int peer, const Body& body);

  std::shared_ptr<GlooShared> shared_;
  std::vector<int> members_;
  std::int64_t exchanges_ = 0;

  std::mutex mutex_;
  bool aborted_ = false;
  std::vector<WorkPointer> works_;  ///< under way
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group_;
};

}  // namespace tailor
