#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"

namespace tailor {

/// What every rank says of itself when it comes to the meeting point.
struct RankPeer {
  int rank = 0;
  int world_size = 1;
  int local_world_size = 0;  ///< ranks of its node; 0: it does not know
  std::string host;          ///< its host name
  std::string address;       ///< its own address on the way to the meeting point
  std::int64_t pid = 0;
};
/// "rank 2 (host gpu03, pid 4711)".
std::string peer_text(const RankPeer& peer);
/// As the meeting point holds it. peer_from() throws Error{bad_file} for other texts.
Json to_json(const RankPeer& peer);
RankPeer peer_from(const std::string& text);
/// Throws Error{usage} naming both when they were told of different numbers of ranks.
void require_size(const RankPeer& one, const RankPeer& other);
/// The node of every rank, numbered from 0 by each node's first rank: ranks of one host, and where
/// LOCAL_WORLD_SIZE says that a host has several nodes of ranks, each so many.
std::vector<int> nodes_of_ranks(const std::vector<RankPeer>& peers);

}  // namespace tailor
