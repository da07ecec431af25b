#include "trainer/ranks/ranks.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>

#include "base/error.h"
#include "base/json.h"

namespace tailor {

std::string_view collective_name(Collective which) {
  constexpr std::array<std::string_view, kCollectives> kNames = {
      "all-gather", "reduce-scatter", "all-reduce", "gather", "broadcast", "barrier"};
  return kNames[static_cast<std::size_t>(which)];
}

std::int64_t RankTraffic::payload_bytes() const {
  return std::accumulate(
      lines.begin(), lines.end(), std::int64_t{0},
      [](std::int64_t sum, const Line& line) { return sum + line.payload_bytes; });
}

std::vector<std::string> all_texts(Ranks& ranks, const std::string& mine) {
  const auto count = static_cast<std::size_t>(ranks.size());
  std::vector<double> sizes(count, 0);
  sizes[static_cast<std::size_t>(ranks.rank())] = static_cast<double>(mine.size());
  ranks.all_reduce(sizes, Reduce::sum);
  const auto longest = static_cast<std::size_t>(*std::max_element(sizes.begin(), sizes.end()));
  std::vector<std::string> out(count);
  if (longest == 0) return out;
  std::vector<std::byte> part(longest), all(longest * count);
  std::memcpy(part.data(), mine.data(), mine.size());
  ranks.all_gather(part, all);
  for (std::size_t r = 0; r < count; ++r) {
    out[r].assign(reinterpret_cast<const char*>(all.data() + r * longest),
                  static_cast<std::size_t>(sizes[r]));
  }
  return out;
}

bool any_rank(Ranks& ranks, bool mine) {
  double value = mine ? 1 : 0;
  ranks.all_reduce({&value, 1}, Reduce::max);
  return value > 0;
}

double sum_over_ranks(Ranks& ranks, double mine) {
  ranks.all_reduce({&mine, 1}, Reduce::sum);
  return mine;
}

void together(Ranks& ranks, const std::string& doing, const std::function<void()>& body) {
  if (ranks.alone()) {
    body();
    return;
  }
  std::exception_ptr failure;
  std::string words;
  try {
    body();
  } catch (const Error& error) {
    failure = std::current_exception();
    words = std::to_string(error.exit_code()) + " " + error.parts().what;
  } catch (const std::exception& error) {
    failure = std::current_exception();
    words = std::to_string(static_cast<int>(Fault::internal)) + " " + error.what();
  }
  const std::vector<std::string> all = all_texts(ranks, words);
  if (failure) std::rethrow_exception(failure);
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (all[r].empty()) continue;
    const std::size_t space = all[r].find(' ');
    throw Error(static_cast<Fault>(std::stoi(all[r].substr(0, space))),
                {"rank " + std::to_string(r) + " failed " + doing + ": " + all[r].substr(space + 1),
                 "rank " + std::to_string(ranks.rank()), "That rank's own message says more."});
  }
}

void require_agreement(Ranks& ranks, std::span<const SharedFact> facts) {
  if (ranks.alone()) return;
  Json mine = Json::array();
  for (const SharedFact& fact : facts) mine.push_back({fact.name, fact.value});
  const std::vector<std::string> texts =
      all_texts(ranks, mine.dump(-1, ' ', false, Json::error_handler_t::replace));
  const Json first = Json::parse(texts.front());
  for (std::size_t r = 1; r < texts.size(); ++r) {
    if (texts[r] == texts.front()) continue;
    const Json other = Json::parse(texts[r]);
    std::size_t at = 0;
    while (at < first.size() && at < other.size() && first[at] == other[at]) ++at;
    const auto part = [&](const Json& of, std::size_t which) {
      return at < of.size() ? of[at][which].get<std::string>() : std::string("nothing");
    };
    throw Error(
        Fault::usage,
        {"ranks 0 and " + std::to_string(r) + " do not agree on " +
             (at < first.size() ? part(first, 0) : part(other, 0)),
         "rank 0: " + part(first, 1) + "\nrank " + std::to_string(r) + ": " + part(other, 1),
         "Start every rank with the same program, recipe, data and model: put them on a "
         "shared file system, or copy them anew to the nodes of the ranks named."});
  }
}

namespace {

class SingleRank final : public Ranks {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    count(Collective::all_gather);
    copy(mine, all);
  }
  void reduce_scatter(std::span<float> all, std::span<float> mine) override {
    count(Collective::reduce_scatter);
    copy(std::as_bytes(all), std::as_writable_bytes(mine));
  }
  void all_reduce(std::span<double>, Reduce) override { count(Collective::all_reduce); }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all, int root) override {
    TAILOR_CHECK(root == 0);
    count(Collective::gather);
    copy(mine, all);
  }
  void broadcast(std::span<std::byte>, int) override { count(Collective::broadcast); }
  void barrier() override { count(Collective::barrier); }
  std::unique_ptr<Ranks> channel(const std::string&) override { return single_rank(); }
  std::unique_ptr<Ranks> node_channel(const std::string&) override { return single_rank(); }
  void abort() noexcept override {}
  RankTraffic traffic() const override { return traffic_; }

 private:
  void count(Collective which) { ++traffic_.of(which).calls; }
  static void copy(std::span<const std::byte> from, std::span<std::byte> to) {
    TAILOR_CHECK(from.size() == to.size());
    if (from.data() != to.data() && !from.empty()) {
      std::memmove(to.data(), from.data(), from.size());
    }
  }
  RankTraffic traffic_;
};

}  // namespace

std::unique_ptr<Ranks> single_rank() { return std::make_unique<SingleRank>(); }

}  // namespace tailor
