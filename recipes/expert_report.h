#pragma once

#include <string>

#include "recipes/expert_choice.h"
#include "recipes/expert_selection.h"

namespace tailor {

/// What one row of a scan's table says of a layer.
struct LayerSummary {
  std::int64_t layer = 0;
  std::int32_t top_expert = -1;  ///< of the largest share; -1: nothing was counted
  double top_share = 0;
  double effective_experts = 0;
  std::int64_t chosen = 0;
  double tokens_covered = 0, gate_covered = 0;
  std::int64_t bytes = 0;  ///< of the chosen experts' factors
};
/// By the layers of `load`, which `selection` must have too. Shares are by selection.by.
std::vector<LayerSummary> summarise(const ExpertLoad& load, const ExpertSelection& selection);

/// The scan as one page of HTML that needs nothing beside it: a heat map of layers x experts with a
/// legend, a tooltip with the counts in each field, chosen experts framed; and a table a layer.
/// Reads in light and in dark. 58 layers of 256 experts take less than 1 MB.
std::string expert_report_html(const ExpertLoad& load, const ExpertSelection& selection);

}  // namespace tailor
