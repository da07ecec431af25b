#include "trainer/ranks/rank_peer.h"

#include <map>
#include <utility>

namespace tailor {

std::string peer_text(const RankPeer& peer) {
  return "rank " + std::to_string(peer.rank) + " (host " + peer.host + ", pid " +
         std::to_string(peer.pid) + ")";
}

std::vector<int> nodes_of_ranks(const std::vector<RankPeer>& peers) {
  std::vector<int> out;
  std::map<std::pair<std::string, int>, int> numbers;
  std::map<std::string, int> on_host;
  for (const RankPeer& peer : peers) {
    const int place = on_host[peer.host]++;
    const int part = peer.local_world_size > 0 ? place / peer.local_world_size : 0;
    const auto next = static_cast<int>(numbers.size());
    out.push_back(numbers.try_emplace({peer.host, part}, next).first->second);
  }
  return out;
}

}  // namespace tailor
