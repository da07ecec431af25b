#include "trainer/models/token_layout.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <set>

#include "base/error.h"

namespace tailor {
namespace {

/// Documents of [begin, end), cut at multiples of `chunk` of their own positions.
std::vector<AttentionSegment> cut(const TokenInput& input, TokenRange range, std::int64_t chunk) {
  std::vector<AttentionSegment> out;
  for (std::size_t d = 0; d + 1 < input.document_start.size(); ++d) {
    const std::int64_t begin = input.document_start[d], end = input.document_start[d + 1];
    if (begin < range.begin || end > range.end || begin == end) continue;
    const std::int64_t step = chunk == 0 ? end - begin : chunk;
    for (std::int64_t at = begin; at < end; at += step) {
      const std::int64_t n = std::min(step, end - at);
      out.push_back({at - range.begin, n, at - range.begin, n});
    }
  }
  return out;
}

/// theta^(2i/dim): what pair i's frequency is one over.
float plain_power(const RopeSpec& rope, std::int64_t dim, std::size_t i) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
  return std::pow(static_cast<float>(rope.theta), exponent);
}

/// Pairs that turn more than beta_fast times over the original length keep their frequency, those
/// that turn less than beta_slow times get it divided by `factor`, a ramp lies between (Peng et
/// al., arXiv 2309.00071, section 3.2; modeling_rope_utils.py, _compute_yarn_parameters).
void slow_by_yarn(const RopeSpec& rope, std::int64_t dim, std::vector<float>& frequencies) {
  const auto pair_turning = [&](double turns) {
    return static_cast<double>(dim) *
           std::log(rope.original_positions / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(rope.theta));
  };
  double low = pair_turning(rope.beta_fast), high = pair_turning(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float ramp = std::clamp(
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0F,
        1.0F);
    const float kept = 1 - ramp;
    const float slowed = 1.0F / (static_cast<float>(rope.factor) * plain_power(rope, dim, i));
    frequencies[i] = slowed * (1 - kept) + frequencies[i] * kept;
  }
}

}  // namespace

std::vector<float> rope_frequencies(const RopeSpec& rope, std::int64_t head_dim) {
  const std::int64_t half = head_dim / 2;
  std::vector<float> out(static_cast<std::size_t>(half));
  for (std::int64_t i = 0; i < half; ++i) {
    const float power = plain_power(rope, head_dim, static_cast<std::size_t>(i));
    float f = 1.0F / power;
    if (rope.kind == RopeSpec::Kind::llama3) {
      // Wave lengths above original/low are slowed by `factor`, those below original/high kept,
      // between them the two are blended (modeling_rope_utils.py, _compute_llama3_parameters).
      const auto old = static_cast<float>(rope.original_positions);
      const auto factor = static_cast<float>(rope.factor);
      const auto low = static_cast<float>(rope.low_freq_factor);
      const auto high = static_cast<float>(rope.high_freq_factor);
      const float wave = 2 * std::numbers::pi_v<float> / f;
      const float slowed = wave > old / low ? f / factor : f;
      if (!(wave < old / high) && !(wave > old / low)) {
        const float smooth = (old / wave - low) / (high - low);
        f = (1 - smooth) * slowed / factor + smooth * slowed;
      } else {
        f = slowed;
      }
    }
    if (rope.kind == RopeSpec::Kind::longrope) {
      f = 1.0F / (static_cast<float>(rope.factors[static_cast<std::size_t>(i)]) * power);
    }
    out[static_cast<std::size_t>(i)] = f;
  }
  if (rope.kind == RopeSpec::Kind::yarn) slow_by_yarn(rope, head_dim, out);
  return out;
}

template <class A>
void rope_tables(const ModelSpec& spec, std::int64_t positions, std::vector<A>& cos,
                 std::vector<A>& sin) {
  const std::vector<float> frequencies = rope_frequencies(spec.rope, spec.rope_width());
  const auto factor = static_cast<float>(spec.rope.attention_factor);
  cos.clear();
  sin.clear();
  for (std::int64_t p = 0; p < positions; ++p) {
    for (const float f : frequencies) {
      const float angle = static_cast<float>(p) * f;
      cos.push_back(static_cast<A>(std::cos(angle) * factor));
      sin.push_back(static_cast<A>(std::sin(angle) * factor));
    }
  }
}

template <class A>
A temperature_at(const ModelSpec& spec, std::int64_t position) {
  const double steps = std::floor((static_cast<double>(position) + 1) / spec.temperature_floor);
  return static_cast<A>(std::log1p(steps) * spec.temperature_scale + 1);
}

template <class A>
TokenLayout<A>::TokenLayout(const ModelSpec& spec, const TokenInput& input)
    : tokens_(static_cast<std::int64_t>(input.ids.size())),
      position_(input.position.begin(), input.position.end()) {
  TAILOR_CHECK(input.position.size() == input.ids.size());
  std::set<std::int64_t> chunks = {0};
  for (const LayerSpec& layer : spec.layers) chunks.insert(layer.attention_chunk);
  for (std::size_t m = 0; m + 1 < input.micro_batch_start.size(); ++m) {
    const TokenRange range{input.micro_batch_start[m], input.micro_batch_start[m + 1]};
    if (range.size() == 0) continue;
    micro_batches_.push_back(range);
    std::int64_t covered = 0;
    for (const std::int64_t chunk : chunks) segments_[chunk].push_back(cut(input, range, chunk));
    for (const AttentionSegment& segment : segments_[0].back()) covered += segment.queries;
    TAILOR_CHECK(covered == range.size(), "a micro-batch must begin and end at document borders");
  }
  std::int32_t last = -1;
  for (const std::int32_t p : position_) last = std::max(last, p);
  rope_tables(spec, std::int64_t{last} + 1, cos_, sin_);
  if (spec.temperature) {
    for (const std::int32_t p : position_) temperature_.push_back(temperature_at<A>(spec, p));
  }
}

template <class A>
std::span<const AttentionSegment> TokenLayout<A>::segments(std::size_t index,
                                                           std::int64_t chunk) const {
  return segments_.at(chunk).at(index);
}

template class TokenLayout<float>;
template class TokenLayout<double>;
template void rope_tables(const ModelSpec&, std::int64_t, std::vector<float>&, std::vector<float>&);
template void rope_tables(const ModelSpec&, std::int64_t, std::vector<double>&,
                          std::vector<double>&);
template float temperature_at<float>(const ModelSpec&, std::int64_t);
template double temperature_at<double>(const ModelSpec&, std::int64_t);

}  // namespace tailor
