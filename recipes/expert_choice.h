#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tailor {

/// How the counted tokens of a scan fell on one layer's routed experts.
struct LayerLoad {
  std::int64_t layer = 0;            ///< of the model, dense layers counted
  std::vector<std::int64_t> tokens;  ///< [E] that chose the expert; all of them: tokens x top-k
  std::vector<double> gate;          ///< [E] sum of the router's weights of those choices
};
struct ExpertLoad {
  std::int64_t tokens = 0;  ///< counted, each once
  std::int64_t experts_per_token = 1;
  std::vector<LayerLoad> layers;  ///< those with routed experts, from the first
};

/// What an expert's worth is measured by (Wang et al., "Let the Expert Stick to His Last: Expert-
/// Specialized Fine-Tuning for Sparse Architectural Large Language Models", arXiv 2407.01906, sec.
/// 3.2): its mean gate weight a token, or its share of the choices. Ours are means over tokens,
/// whatever document they stand in; theirs are means over documents of such means.
enum class ExpertScore { gate, token };
std::string_view expert_score_name(ExpertScore score);

/// Scores of a layer's experts divided by their sum, so that every layer weighs the same; all zero
/// where nothing was counted.
std::vector<double> expert_shares(const LayerLoad& layer, ExpertScore score);

/// exp of the shares' entropy: how many experts of equal share would be as spread out. 0 for all
/// zero.
double effective_experts(std::span<const double> shares);

/// Experts of each layer of a load, ascending; as long as ExpertLoad::layers. No rule below chooses
/// an expert that no token went to: its factors would get no gradient. Equal shares: the lower
/// layer, then the lower expert, first.
using ChosenExperts = std::vector<std::vector<std::int32_t>>;

/// Per layer the fewest experts, by falling share, whose shares add up to `top_p` or more (ESFT);
/// 1: all that a token went to. Within 1e-12, so that sums of thirds reach what they should.
ChosenExperts choose_top_p(const ExpertLoad& load, ExpertScore score, double top_p);
/// Per layer the `count` experts of the largest shares.
ChosenExperts choose_count(const ExpertLoad& load, ExpertScore score, std::int64_t count);
/// Of the whole model the `total` experts of the largest shares, so that a layer whose tokens
/// gather on few experts gets its few, and one that spreads them may get none. An expert's factors
/// are as large as any other's: the largest shares first is also the best use of a cap on bytes.
ChosenExperts choose_total(const ExpertLoad& load, ExpertScore score, std::int64_t total);

std::int64_t count_experts(const ChosenExperts& chosen);

/// Share of a layer's choices, and of its gate weight, that falls on `experts`.
struct Coverage {
  double tokens = 0, gate = 0;
};
Coverage coverage(const LayerLoad& layer, std::span<const std::int32_t> experts);

}  // namespace tailor
