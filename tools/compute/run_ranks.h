#pragma once

#include <functional>
#include <memory>
#include <string>

#include "trainer/ranks/c10d_ranks.h"

namespace tailor {

/// What the environment says of how ranks talk (docs/ranks.md): TAILOR_RANK_BACKEND,
/// TAILOR_RANK_TIMEOUT, TAILOR_COLLECTIVE_TIMEOUT. Throws Error{usage} for other values than they
/// take.
ConnectOptions rank_options(const EnvLookup& env);

/// The ranks of a run as its verb sees them: one where the environment speaks of no others.
class RunRanks {
 public:
  /// Meets the others that the environment speaks of; throws as read_rank_env() and connect_ranks()
  /// do. Ranks but the first keep their informational messages to themselves.
  RunRanks();
  RunRanks(const RunRanks&) = delete;
  RunRanks& operator=(const RunRanks&) = delete;

  Ranks& all() { return *ranks_; }
  /// Null where this rank is alone: what takes ranks then does as if there were none.
  Ranks* others() { return ranks_->alone() ? nullptr : ranks_.get(); }
  /// The ranks that split the frozen weights among them, this one's group; null: this rank alone.
  /// With several nodes of several ranks each a node's ranks, so that weights never cross the
  /// network; else all.
  Ranks* sharing_weights();
  int size() const { return ranks_->size(); }
  bool first() const { return ranks_->first(); }
  int on_this_node() const { return on_this_node_; }
  int sharing_cores() const { return sharing_cores_; }  ///< ranks that may use the same ones
  int nodes() const { return nodes_; }
  std::string name() const;  ///< "rank 2"

  /// For the other ranks' messages, should this one go missing.
  void doing(const std::string& what);
  /// `make` on rank 0, then on one rank of every other node, then on the rest: what it makes in a
  /// cache that some of them share is made once. A failure of one is one of all.
  void in_turns(const std::string& what, const std::function<void()>& make);
  /// Runs the verb. What it throws is told to the other ranks before it goes on from here; what it
  /// returns comes back when all have come that far.
  int run(const std::function<int()>& body);

 private:
  std::unique_ptr<Ranks> ranks_, node_;
  bool nodes_alike_ = true;  ///< as many ranks on each
  int place_on_node_ = 0, on_this_node_ = 1, sharing_cores_ = 1, nodes_ = 1;
};

}  // namespace tailor
