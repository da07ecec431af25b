#include "trainer/ranks/c10d_ranks.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <numeric>

#include "base/clock.h"
#include "base/error.h"
#include "trainer/ranks/device_ranks.h"
#include "trainer/ranks/gloo_exchange.h"

namespace tailor {
namespace {

/// Everything is made of sends and receives between pairs of ranks: Gloo's device thread moves them
/// between socket and caller's memory without a copy, and a wait can be ended from outside, which
/// Gloo's own collectives do not allow.
class GlooRanks final : public WatchedRanks {
 public:
  /// `members`: the ranks of the run that talk here; this process is members[place].
  GlooRanks(std::shared_ptr<GlooShared> shared, std::string prefix, std::string name,
            std::vector<int> members, int place, bool owner)
      : shared_(std::move(shared)),
        prefix_(std::move(prefix)),
        name_(std::move(name)),
        members_(std::move(members)),
        place_(place),
        owner_(owner) {
    const RankWatch::Call call(*watch(), "connecting" + of_name());
    exchange_ = std::make_unique<GlooExchange>(shared_, prefix_, members_, place_);
    on_death_ = watch()->on_death([this] { exchange_->end_calls(); });
  }
  ~GlooRanks() override {
    if (owner_) watch()->close();  // all are done with each other before connections close
    watch()->forget(on_death_);
  }

  RankWatch* watch() const override { return shared_->watch.get(); }
  int rank() const override { return place_; }
  int size() const override { return static_cast<int>(members_.size()); }

  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    TAILOR_CHECK(all.size() == mine.size() * count());
    const Timed timed(*this, Collective::all_gather, parts_sent(mine.size()));
    gather_all(mine.data(), all.data(), mine.size());
  }

  void reduce_scatter(std::span<float> all, std::span<float> mine) override {
    TAILOR_CHECK(all.size() == mine.size() * count());
    const Timed timed(*this, Collective::reduce_scatter, parts_sent(mine.size_bytes()));
    const std::size_t n = mine.size(), others = count() - 1;
    scratch_.resize(std::max(scratch_.size(), n * others));
    // In pieces, so that what has come is summed while the rest is on its way.
    std::vector<Piece> sends, receives;
    for (std::size_t at = 0; at < n; at += kSumPiece) {
      const std::size_t bytes = std::min(kSumPiece, n - at) * sizeof(float);
      for (int step = 1; step < size(); ++step) {
        const int to = (place_ + step) % size(), from = (place_ - step + size()) % size();
        sends.push_back({to, all.data() + n * index(to) + at, bytes});
        receives.push_back({from, scratch_.data() + n * index(step - 1) + at, bytes});
      }
    }
    std::vector<const float*> parts(count());  // by rank
    for (int step = 0; step < size(); ++step) {
      parts[index((place_ - step + size()) % size())] =
          step == 0 ? all.data() + n * index(place_) : scratch_.data() + n * index(step - 1);
    }
    if (others == 0) sum_in_order(parts, mine, 0, n);
    exchange(sends, receives, [&](std::size_t done) {
      if ((done + 1) % others != 0) return;
      const std::size_t at = done / others * kSumPiece;
      sum_in_order(parts, mine, at, std::min(n, at + kSumPiece));
    });
  }

  void all_reduce(std::span<double> values, Reduce how) override {
    const Timed timed(*this, Collective::all_reduce, 2 * parts_sent(values.size_bytes() / count()));
    std::vector<double> all(values.size() * count());
    gather_all(values.data(), all.data(), values.size_bytes());
    for (std::size_t i = 0; i < values.size(); ++i) {
      double out = all[i];
      for (std::size_t r = 1; r < count(); ++r) {
        const double other = all[r * values.size() + i];
        out = how == Reduce::sum ? out + other : std::max(out, other);
      }
      values[i] = out;
    }
  }

  void gather(std::span<const std::byte> mine, std::span<std::byte> all, int root) override {
    TAILOR_CHECK(all.size() == (place_ == root ? mine.size() * count() : 0));
    const Timed timed(*this, Collective::gather,
                      place_ == root ? 0 : static_cast<std::int64_t>(mine.size()));
    if (place_ != root) {
      exchange({{root, mine.data(), mine.size()}}, {});
      return;
    }
    std::vector<Piece> receives;
    for (int from = 0; from < size(); ++from) {
      if (from != place_)
        receives.push_back({from, all.data() + mine.size() * index(from), mine.size()});
    }
    copy_own(mine.data(), all.data(), mine.size());
    exchange({}, receives);
  }

  void broadcast(std::span<std::byte> bytes, int root) override {
    const Timed timed(*this, Collective::broadcast, place_ == root ? parts_sent(bytes.size()) : 0);
    if (place_ != root) {
      exchange({}, {{root, bytes.data(), bytes.size()}});
      return;
    }
    std::vector<Piece> sends;
    for (int step = 1; step < size(); ++step) {
      sends.push_back({(place_ + step) % size(), bytes.data(), bytes.size()});
    }
    exchange(sends, {});
  }

  /// Each rank hears, over one in 2, 4, 8 ..., of all: log2 of the ranks rounds.
  void barrier() override {
    const Timed timed(*this, Collective::barrier, 0);
    std::byte word{1}, heard{};
    for (int step = 1; step < size(); step *= 2) {
      exchange({{(place_ + step) % size(), &word, 1}},
               {{(place_ - step + size()) % size(), &heard, 1}});
    }
  }

  std::unique_ptr<Ranks> channel(const std::string& name) override {
    return part(name, "channel", members_);
  }

  std::unique_ptr<Ranks> node_channel(const std::string& name) override {
    const std::vector<int> nodes = nodes_of_ranks(shared_->peers);
    const auto node_of = [&](int rank) { return nodes[static_cast<std::size_t>(rank)]; };
    const int node = node_of(members_[index(place_)]);
    std::vector<int> members;
    for (const int rank : members_) {
      if (node_of(rank) == node) members.push_back(rank);
    }
    return part(name, "node " + std::to_string(node), members);
  }

  void abort() noexcept override {
    watch()->end_conversation();
    exchange_->end_calls();
  }

  RankTraffic traffic() const override { return traffic_; }

 private:
  using Piece = GlooExchange::Piece;

  /// Counts a call, and says to the watch that it is under way.
  class Timed {
   public:
    Timed(GlooRanks& ranks, Collective what, std::int64_t payload_bytes)
        : line_(ranks.traffic_.of(what)),
          payload_bytes_(payload_bytes),
          call_(*ranks.watch(), ranks.begin(what)) {
      ranks.call_ = &call_;
    }
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;
    ~Timed() {
      ++line_.calls;
      line_.payload_bytes += payload_bytes_;
      line_.seconds += seconds_now() - began_;
    }

   private:
    RankTraffic::Line& line_;
    std::int64_t payload_bytes_;
    double began_ = seconds_now();
    RankWatch::Call call_;
  };

  /// out[i] = the parts' element i added to zero in rank order, for i in [begin, end). `out` may be
  /// one of the parts.
  static void sum_in_order(const std::vector<const float*>& parts, std::span<float> out,
                           std::size_t begin, std::size_t end) {
    constexpr std::size_t kBlock = 1024;
    std::array<float, kBlock> sum;
    for (std::size_t at = begin; at < end; at += kBlock) {
      const std::size_t n = std::min(kBlock, end - at);
      std::fill_n(sum.begin(), n, 0.0F);
      for (const float* const part : parts) {
        for (std::size_t i = 0; i < n; ++i) sum[i] += part[at + i];
      }
      std::copy_n(sum.begin(), n, out.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }

  static constexpr std::size_t kSumPiece = std::size_t{1} << 18;  // floats
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }
  std::size_t count() const { return members_.size(); }
  std::int64_t parts_sent(std::size_t part_bytes) const {
    return static_cast<std::int64_t>(part_bytes * (count() - 1));
  }
  std::string of_name() const { return name_.empty() ? "" : " of " + name_; }
  std::string begin(Collective what) {
    doing_ = std::string(collective_name(what)) + " " + std::to_string(++calls_) + of_name();
    return doing_;
  }

  void copy_own(const void* mine, std::byte* all, std::size_t bytes) const {
    std::byte* const own = all + bytes * index(place_);
    if (bytes > 0 && own != mine) std::memcpy(own, mine, bytes);
  }

  void gather_all(const void* mine, void* all, std::size_t bytes) {
    auto* const parts = static_cast<std::byte*>(all);
    copy_own(mine, parts, bytes);
    std::vector<Piece> sends, receives;
    for (int step = 1; step < size(); ++step) {
      const int to = (place_ + step) % size(), from = (place_ - step + size()) % size();
      sends.push_back({to, mine, bytes});
      receives.push_back({from, parts + bytes * index(from), bytes});
    }
    exchange(sends, receives);
  }

  std::unique_ptr<Ranks> part(const std::string& name, const std::string& kind,
                              const std::vector<int>& members) {
    barrier();  // the store need not wait for who comes late
    const int rank = members_[index(place_)];
    const auto at = std::find(members.begin(), members.end(), rank) - members.begin();
    return std::make_unique<GlooRanks>(
        shared_, prefix_ + "/" + kind + " " + std::to_string(++parts_) + " " + name, name, members,
        static_cast<int>(at), false);
  }

  void exchange(const std::vector<Piece>& sends, const std::vector<Piece>& receives,
                const std::function<void(std::size_t)>& received = {}) {
    exchange_->exchange(*call_, doing_, sends, receives, received);
  }

  std::shared_ptr<GlooShared> shared_;
  std::string prefix_, name_;
  std::vector<int> members_;
  int place_;
  bool owner_;
  int on_death_ = 0, parts_ = 0;
  std::int64_t calls_ = 0;
  std::string doing_;
  RankWatch::Call* call_ = nullptr;  ///< the one under way
  RankTraffic traffic_;
  std::vector<float> scratch_;
  std::unique_ptr<GlooExchange> exchange_;
};

}  // namespace

RankBackend rank_backend(const std::string& name) {
  if (name == "auto") return RankBackend::automatic;
  if (name == "gloo") return RankBackend::gloo;
  if (name == "nccl") return RankBackend::nccl;
  throw Error(Fault::usage, {"backend '" + name + "' is not known", "TAILOR_RANK_BACKEND",
                             "Use auto, gloo or nccl."});
}

void require_backend(const ConnectOptions& options) {
  if (options.backend == RankBackend::nccl && !options.cuda) {
    throw Error(Fault::usage, {"backend nccl moves device memory, and this run computes on the CPU",
                               "backend nccl (TAILOR_RANK_BACKEND)",
                               "Use auto or gloo, or compute.device: cuda."});
  }
  if (options.backend == RankBackend::gloo && options.cuda) {
    throw Error(Fault::usage, {"backend gloo moves host memory, and this run computes on CUDA",
                               "backend gloo (TAILOR_RANK_BACKEND)",
                               "Use auto or nccl, or compute.device: cpu."});
  }
}

std::unique_ptr<Ranks> connect_ranks(const RankEnv& env, const ConnectOptions& options) {
  require_backend(options);
  RankMeeting meeting = meet_ranks(env, options.meet);
  auto shared = std::make_shared<GlooShared>();
  shared->connect_timeout_s = options.meet.connect_timeout_s;
  shared->peers = std::move(meeting.peers);
  shared->store = std::move(meeting.store);
  shared->watch = std::make_unique<RankWatch>(shared->store->connect_again(), shared->peers,
                                              env.rank, meeting.place, meeting.keeps_store,
                                              meeting.agent_store, options.watch);
  std::vector<int> members(shared->peers.size());
  std::iota(members.begin(), members.end(), 0);
  auto host = std::make_unique<GlooRanks>(shared, "ranks", "", members, env.rank, true);
  if (!options.cuda) return host;
  return device_ranks(std::move(host), *shared->store, "ranks");
}

RankWatch* watch_of(Ranks& ranks) {
  auto* const ours = dynamic_cast<WatchedRanks*>(&ranks);
  return ours == nullptr ? nullptr : ours->watch();
}

}  // namespace tailor
