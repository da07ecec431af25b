#include "recipes/expert_choice.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"

namespace tailor {
namespace {

constexpr double kSlack = 1e-12;

struct Candidate {
  std::size_t layer = 0;  ///< place among the load's layers
  std::int32_t expert = 0;
  double share = 0;
};

/// Experts that a token went to, by falling share; experts of equal share stay in order.
std::vector<Candidate> ranked(const LayerLoad& layer, std::size_t at, ExpertScore score) {
  const std::vector<double> shares = expert_shares(layer, score);
  std::vector<Candidate> out;
  for (std::size_t e = 0; e < shares.size(); ++e) {
    if (layer.tokens[e] > 0) out.push_back({at, static_cast<std::int32_t>(e), shares[e]});
  }
  std::stable_sort(out.begin(), out.end(),
                   [](const Candidate& a, const Candidate& b) { return a.share > b.share; });
  return out;
}

ChosenExperts ascending(ChosenExperts chosen) {
  for (std::vector<std::int32_t>& layer : chosen) std::sort(layer.begin(), layer.end());
  return chosen;
}

}  // namespace

std::string_view expert_score_name(ExpertScore score) {
  return score == ExpertScore::gate ? "gate" : "token";
}

std::vector<double> expert_shares(const LayerLoad& layer, ExpertScore score) {
  TAILOR_CHECK(layer.tokens.size() == layer.gate.size());
  std::vector<double> shares(layer.tokens.size());
  for (std::size_t e = 0; e < shares.size(); ++e) {
    shares[e] = score == ExpertScore::gate ? layer.gate[e] : static_cast<double>(layer.tokens[e]);
  }
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  if (sum > 0) {
    for (double& share : shares) share /= sum;
  }
  return shares;
}

double effective_experts(std::span<const double> shares) {
  double entropy = 0;
  bool any = false;
  for (const double share : shares) {
    if (share <= 0) continue;
    any = true;
    entropy -= share * std::log(share);
  }
  return any ? std::exp(entropy) : 0;
}

ChosenExperts choose_top_p(const ExpertLoad& load, ExpertScore score, double top_p) {
  TAILOR_CHECK(top_p > 0 && top_p <= 1);
  ChosenExperts chosen(load.layers.size());
  for (std::size_t l = 0; l < load.layers.size(); ++l) {
    double sum = 0;
    for (const Candidate& next : ranked(load.layers[l], l, score)) {
      if (top_p < 1 && sum >= top_p - kSlack) break;
      sum += next.share;
      chosen[l].push_back(next.expert);
    }
  }
  return ascending(std::move(chosen));
}

ChosenExperts choose_count(const ExpertLoad& load, ExpertScore score, std::int64_t count) {
  TAILOR_CHECK(count > 0);
  ChosenExperts chosen(load.layers.size());
  for (std::size_t l = 0; l < load.layers.size(); ++l) {
    for (const Candidate& next : ranked(load.layers[l], l, score)) {
      if (static_cast<std::int64_t>(chosen[l].size()) == count) break;
      chosen[l].push_back(next.expert);
    }
  }
  return ascending(std::move(chosen));
}

ChosenExperts choose_total(const ExpertLoad& load, ExpertScore score, std::int64_t total) {
  TAILOR_CHECK(total >= 0);
  std::vector<Candidate> all;
  for (std::size_t l = 0; l < load.layers.size(); ++l) {
    const std::vector<Candidate> of_layer = ranked(load.layers[l], l, score);
    all.insert(all.end(), of_layer.begin(), of_layer.end());
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Candidate& a, const Candidate& b) { return a.share > b.share; });
  ChosenExperts chosen(load.layers.size());
  const auto many = std::min(all.size(), static_cast<std::size_t>(total));
  for (std::size_t i = 0; i < many; ++i) chosen[all[i].layer].push_back(all[i].expert);
  return ascending(std::move(chosen));
}

std::int64_t count_experts(const ChosenExperts& chosen) {
  std::int64_t total = 0;
  for (const auto& layer : chosen) total += static_cast<std::int64_t>(layer.size());
  return total;
}

Coverage coverage(const LayerLoad& layer, std::span<const std::int32_t> experts) {
  const std::vector<double> tokens = expert_shares(layer, ExpertScore::token);
  const std::vector<double> gate = expert_shares(layer, ExpertScore::gate);
  Coverage out;
  for (const std::int32_t expert : experts) {
    out.tokens += tokens[static_cast<std::size_t>(expert)];
    out.gate += gate[static_cast<std::size_t>(expert)];
  }
  return out;
}

}  // namespace tailor
