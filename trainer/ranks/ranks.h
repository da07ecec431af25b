#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

enum class Collective { all_gather, reduce_scatter, all_reduce, gather, broadcast, barrier };
constexpr int kCollectives = 6;
std::string_view collective_name(Collective which);

/// What went through one communicator. Payload is what the algorithm must move: of N ranks and n
/// bytes in all, a rank sends n / N * (N - 1) in all_gather, as much in reduce_scatter, twice that
/// in all_reduce. What the wire carries beyond it (headers, an algorithm that sends more) is not in
/// here.
struct RankTraffic {
  struct Line {
    std::int64_t calls = 0;
    std::int64_t payload_bytes = 0;  ///< sent by this rank
    double seconds = 0;              ///< between call and return
  };
  std::array<Line, kCollectives> lines{};
  Line& of(Collective which) { return lines[static_cast<std::size_t>(which)]; }
  const Line& of(Collective which) const { return lines[static_cast<std::size_t>(which)]; }
  std::int64_t payload_bytes() const;
};

enum class Reduce { sum, max };

/// One rank's side of a group of ranks, and the conversation it has with the others. All ranks of a
/// group make the same calls with the same sizes in the same order; a call returns when this rank's
/// part in it is done. One thread at a time uses a communicator: a thread that talks on its own has
/// a channel() of its own.
///
/// A call throws Error{device} when a rank of the group is gone or does not answer in time, naming
/// it where that is known. After that the communicator is of no use.
class Ranks {
 public:
  virtual ~Ranks() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  bool alone() const { return size() == 1; }
  bool first() const { return rank() == 0; }

  /// all = the parts of all ranks in rank order; all.size() == size() * mine.size(). `mine` may be
  /// this rank's place in `all`.
  virtual void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) = 0;
  /// mine = sum over ranks of their part rank() of `all`; all.size() == size() * mine.size(). Sums
  /// are taken in rank order, so two runs of one size give the same bits. `mine` may be this rank's
  /// place in `all`; the rest of `all` is left as it was or not.
  virtual void reduce_scatter(std::span<float> all, std::span<float> mine) = 0;
  /// The same bits on every rank.
  virtual void all_reduce(std::span<double> values, Reduce how) = 0;
  /// all (on `root` only; empty elsewhere) = the parts of all ranks in rank order.
  virtual void gather(std::span<const std::byte> mine, std::span<std::byte> all, int root) = 0;
  virtual void broadcast(std::span<std::byte> bytes, int root) = 0;
  virtual void barrier() = 0;

  /// Another communicator of the same ranks, for another thread. Collective: all ranks make their
  /// channels in one order. `name` tells which in messages.
  virtual std::unique_ptr<Ranks> channel(const std::string& name) = 0;
  /// The ranks of this one's node, by their place in the order of ranks; collective. One node: as
  /// channel().
  virtual std::unique_ptr<Ranks> node_channel(const std::string& name) = 0;
  /// Ends the conversation: calls under way and later ones throw, here at once, elsewhere soon. Any
  /// thread may call it.
  virtual void abort() noexcept = 0;

  virtual RankTraffic traffic() const = 0;
};

/// What every rank has to say, on every rank, in rank order. Collective.
std::vector<std::string> all_texts(Ranks& ranks, const std::string& mine);
/// Whether any rank says so. Collective.
bool any_rank(Ranks& ranks, bool mine);
double sum_over_ranks(Ranks& ranks, double mine);

/// Runs `body` on every rank. What it throws on one is thrown there, and on every other rank an
/// Error of the same fault that names this one: nobody goes on alone, and nobody waits. `doing`
/// completes "rank 2 failed ...". Collective.
void together(Ranks& ranks, const std::string& doing, const std::function<void()>& body);

/// Throws Error{usage} on every rank when they do not all have the same `facts`: pairs of what a
/// person calls the thing, and its value or digest, in one order. Names the first that differs,
/// both values and both ranks. Collective.
struct SharedFact {
  std::string name, value;
};
void require_agreement(Ranks& ranks, std::span<const SharedFact> facts);

/// The only rank.
std::unique_ptr<Ranks> single_rank();

/// `count` ranks that are threads of this process: for tests, and to see what sharding costs
/// without a network. Give each to a thread of its own. `per_node`: ranks of a node; 0: all.
std::vector<std::unique_ptr<Ranks>> thread_ranks(int count, int per_node = 0);

}  // namespace tailor
