#include "trainer/ranks/rank_peer.h"

#include <map>
#include <utility>

#include "base/error.h"

namespace tailor {

std::string peer_text(const RankPeer& peer) {
  return "rank " + std::to_string(peer.rank) + " (host " + peer.host + ", pid " +
         std::to_string(peer.pid) + ")";
}

Json to_json(const RankPeer& peer) {
  return {{"rank", peer.rank},
          {"world_size", peer.world_size},
          {"local_world_size", peer.local_world_size},
          {"host", peer.host},
          {"address", peer.address},
          {"pid", peer.pid}};
}

RankPeer peer_from(const std::string& text) {
  const Json json = parse_json(text, "the meeting point of the ranks");
  const JsonReader read(json, "the meeting point of the ranks");
  RankPeer out;
  out.rank = static_cast<int>(read.integer("rank"));
  out.world_size = static_cast<int>(read.integer("world_size"));
  out.local_world_size = static_cast<int>(read.integer("local_world_size"));
  out.host = read.text("host");
  out.address = read.text("address");
  out.pid = read.integer("pid");
  return out;
}

void require_size(const RankPeer& one, const RankPeer& other) {
  if (one.world_size == other.world_size) return;
  const auto of = [](const RankPeer& peer) {
    return "rank " + std::to_string(peer.rank) +
           " with WORLD_SIZE=" + std::to_string(peer.world_size);
  };
  throw Error(Fault::usage,
              {"the ranks do not agree on their number: " + of(one) + ", " + of(other),
               peer_text(one) + "\n" + peer_text(other),
               "Start all ranks with one WORLD_SIZE. If one of them is left from an earlier run, "
               "end it or choose another MASTER_PORT."});
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
