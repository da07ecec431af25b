#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/rank_env.h"
#include "trainer/ranks/rank_peer.h"

namespace tailor {

/// One connection to the key-value store in which the ranks of a run find each other. Calls throw
/// Error{device} when the connection or the store is lost. One thread at a time; a store that is
/// alive but does not answer blocks the call, so a thread that must not wait has another do it.
class RankStore {
 public:
  virtual ~RankStore() = default;
  virtual void set(const std::string& key, const std::string& text) = 0;
  /// The texts of keys that exist, in their order.
  virtual std::vector<std::string> get(const std::vector<std::string>& keys) = 0;
  virtual bool has(const std::string& key) = 0;
  /// Adds to a counter that starts at 0, and returns its new value.
  virtual std::int64_t add(const std::string& key, std::int64_t amount) = 0;
  /// Another connection to the same store, for another thread.
  virtual std::unique_ptr<RankStore> connect_again() = 0;
};

struct MeetOptions {
  double connect_timeout_s = 30;  ///< until the meeting point must have answered
  double join_timeout_s = 300;    ///< until all ranks must have come to it
  double notice_s = 5;            ///< after so long, and again, a line says what is waited for
};

/// All ranks, found.
struct RankMeeting {
  std::unique_ptr<RankStore> store;  ///< keys are this run's own: other runs' have other prefixes
  std::vector<RankPeer> peers;       ///< by rank
  std::string place;                 ///< "host:port"
  bool keeps_store = false;          ///< the store lives in this process
  bool agent_store = false;          ///< it lives in torchrun's agent, not in rank 0
};

/// Brings the ranks of a run together at MASTER_ADDR:MASTER_PORT: rank 0 opens a c10d TCPStore
/// there (unless torchrun's agent has), the others come to it. Throws Error{device} when the
/// address does not answer in time, is taken, or a rank does not come; Error{usage} when what
/// answers is not this run's store, or a rank was started with another WORLD_SIZE.
RankMeeting meet_ranks(const RankEnv& env, const MeetOptions& options = {});

}  // namespace tailor
