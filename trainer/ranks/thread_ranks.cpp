#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>

#include "base/clock.h"
#include "base/error.h"
#include "trainer/ranks/ranks.h"

namespace tailor {
namespace {

/// What the ranks of one communicator share: everybody's arguments of the call under way.
struct Meeting {
  explicit Meeting(int count) : calls(static_cast<std::size_t>(count)) {}

  struct Call {
    Collective what = Collective::barrier;
    const void* in = nullptr;
    void* out = nullptr;
    std::size_t bytes = 0;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Call> calls;
  std::size_t arrived = 0;
  std::int64_t round = 0;
  bool aborted = false;
  /// Communicators made from this one: by name, and by name and node.
  std::map<std::string, std::shared_ptr<Meeting>> channels;

  /// Returns once all have come. Throws when the meeting is off, or they do not want the same.
  void meet(std::unique_lock<std::mutex>& lock) {
    const std::int64_t mine = round;
    if (++arrived == calls.size()) {
      arrived = 0;
      ++round;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return round != mine || aborted; });
    }
    if (aborted) {
      throw Error(Fault::device, {"the conversation of the ranks was ended", "thread ranks",
                                  "Another rank failed; its message says why."});
    }
  }
};

class ThreadRank final : public Ranks {
 public:
  ThreadRank(std::shared_ptr<Meeting> meeting, int rank, int per_node)
      : meeting_(std::move(meeting)), rank_(rank), per_node_(per_node) {}

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(meeting_->calls.size()); }

  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    TAILOR_CHECK(all.size() == mine.size() * count());
    talk({Collective::all_gather, mine.data(), all.data(), mine.size()}, parts_sent(mine.size()),
         [&](const std::vector<Meeting::Call>& calls) {
           for (std::size_t r = 0; r < calls.size(); ++r) {
             // In place: the others are reading there.
             std::byte* const to = all.data() + r * mine.size();
             if (to != calls[r].in) std::memmove(to, calls[r].in, mine.size());
           }
         });
  }

  void reduce_scatter(std::span<float> all, std::span<float> mine) override {
    TAILOR_CHECK(all.size() == mine.size() * count());
    std::vector<float> sum(mine.size(), 0.0F);
    const std::size_t at = mine.size() * static_cast<std::size_t>(rank_);
    talk({Collective::reduce_scatter, all.data(), nullptr, all.size_bytes()},
         parts_sent(mine.size_bytes()), [&](const std::vector<Meeting::Call>& calls) {
           for (const Meeting::Call& call : calls) {
             const auto* from = static_cast<const float*>(call.in) + at;
             for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += from[i];
           }
         });
    std::copy(sum.begin(), sum.end(), mine.begin());
  }

  void all_reduce(std::span<double> values, Reduce how) override {
    std::vector<double> out(values.size());
    talk({Collective::all_reduce, values.data(), nullptr, values.size_bytes()},
         2 * parts_sent(values.size_bytes() / count()),
         [&](const std::vector<Meeting::Call>& calls) {
           const auto at = [&](std::size_t r, std::size_t i) {
             return static_cast<const double*>(calls[r].in)[i];
           };
           for (std::size_t i = 0; i < out.size(); ++i) {
             out[i] = at(0, i);
             for (std::size_t r = 1; r < calls.size(); ++r) {
               out[i] = how == Reduce::sum ? out[i] + at(r, i) : std::max(out[i], at(r, i));
             }
           }
         });
    std::copy(out.begin(), out.end(), values.begin());
  }

  void gather(std::span<const std::byte> mine, std::span<std::byte> all, int root) override {
    TAILOR_CHECK(all.size() == (rank_ == root ? mine.size() * count() : 0));
    talk({Collective::gather, mine.data(), all.data(), mine.size()},
         rank_ == root ? 0 : static_cast<std::int64_t>(mine.size()),
         [&](const std::vector<Meeting::Call>& calls) {
           if (rank_ != root) return;
           for (std::size_t r = 0; r < calls.size(); ++r) {
             std::memmove(all.data() + r * mine.size(), calls[r].in, mine.size());
           }
         });
  }

  void broadcast(std::span<std::byte> bytes, int root) override {
    talk({Collective::broadcast, bytes.data(), nullptr, bytes.size()},
         rank_ == root ? parts_sent(bytes.size()) : 0,
         [&](const std::vector<Meeting::Call>& calls) {
           if (rank_ == root) return;
           std::memcpy(bytes.data(), calls[static_cast<std::size_t>(root)].in, bytes.size());
         });
  }

  void barrier() override {
    talk({Collective::barrier, nullptr, nullptr, 0}, 0, [](const std::vector<Meeting::Call>&) {});
  }

  std::unique_ptr<Ranks> channel(const std::string& name) override {
    return std::make_unique<ThreadRank>(part(name, size()), rank_, per_node_);
  }
  std::unique_ptr<Ranks> node_channel(const std::string& name) override {
    if (per_node_ == 0 || per_node_ >= size()) return channel(name);
    const int node = rank_ / per_node_;
    const int members = std::min(per_node_, size() - node * per_node_);
    return std::make_unique<ThreadRank>(part(name + " of node " + std::to_string(node), members),
                                        rank_ % per_node_, 0);
  }

  void abort() noexcept override { abort(*meeting_); }
  RankTraffic traffic() const override { return traffic_; }

 private:
  std::size_t count() const { return meeting_->calls.size(); }
  std::int64_t parts_sent(std::size_t part_bytes) const {
    return static_cast<std::int64_t>(part_bytes * (count() - 1));
  }

  static void abort(Meeting& meeting) noexcept {
    const std::lock_guard lock(meeting.mutex);
    meeting.aborted = true;
    meeting.changed.notify_all();
    for (auto& [name, channel] : meeting.channels) abort(*channel);
  }

  std::shared_ptr<Meeting> part(const std::string& name, int members) {
    const std::lock_guard lock(meeting_->mutex);
    std::shared_ptr<Meeting>& found = meeting_->channels[name];
    if (!found) found = std::make_shared<Meeting>(members);
    return found;
  }

  /// All come with their arguments; each reads what it needs; none leaves before all have read.
  template <class Read>
  void talk(const Meeting::Call& call, std::int64_t payload_bytes, const Read& read) {
    const double began = seconds_now();
    {
      std::unique_lock lock(meeting_->mutex);
      meeting_->calls[static_cast<std::size_t>(rank_)] = call;
      meeting_->meet(lock);
      for (const Meeting::Call& other : meeting_->calls) {
        TAILOR_CHECK(other.what == call.what && other.bytes == call.bytes,
                     "ranks make different calls");
      }
    }
    read(meeting_->calls);
    {
      std::unique_lock lock(meeting_->mutex);
      meeting_->meet(lock);
    }
    RankTraffic::Line& line = traffic_.of(call.what);
    ++line.calls;
    line.payload_bytes += payload_bytes;
    line.seconds += seconds_now() - began;
  }

  std::shared_ptr<Meeting> meeting_;
  int rank_, per_node_;
  RankTraffic traffic_;
};

}  // namespace

std::vector<std::unique_ptr<Ranks>> thread_ranks(int count, int per_node) {
  TAILOR_CHECK(count > 0);
  const auto meeting = std::make_shared<Meeting>(count);
  std::vector<std::unique_ptr<Ranks>> out;
  for (int r = 0; r < count; ++r) {
    out.push_back(std::make_unique<ThreadRank>(meeting, r, per_node));
  }
  return out;
}

}  // namespace tailor
