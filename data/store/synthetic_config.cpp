#include <algorithm>
#include <charconv>
#include <optional>

#include "base/error.h"
#include "base/text.h"
#include "data/store/synthetic.h"

namespace tailor {
namespace {

[[noreturn]] void refuse(const std::string& what, std::int64_t layers) {
  throw Error(Fault::usage,
              {what, "--layers",
               "Give a count from 1 to " + std::to_string(layers) + ", or layers from 0 to " +
                   std::to_string(layers - 1) + " such as 0,1 or 0-3,7."});
}

std::optional<std::int64_t> number_of(std::string_view text) {
  std::int64_t out = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (error != std::errc() || end != text.data() + text.size() || out < 0) return std::nullopt;
  return out;
}

std::vector<std::int64_t> first_layers(const ModelSpec& spec, std::int64_t count) {
  std::vector<std::int64_t> first, others;
  bool seen[2] = {false, false};
  for (std::int64_t l = 0; l < spec.layer_count(); ++l) {
    bool& known = seen[spec.layers[static_cast<std::size_t>(l)].moe ? 1 : 0];
    (known ? others : first).push_back(l);
    known = true;
  }
  first.insert(first.end(), others.begin(), others.end());
  first.resize(static_cast<std::size_t>(count));
  std::sort(first.begin(), first.end());
  return first;
}

/// The llama4 interval that makes exactly `moe` layers mixtures: `before` if it does, or none.
std::optional<std::int64_t> moe_step(const std::vector<bool>& moe, std::int64_t before) {
  const auto count = static_cast<std::int64_t>(moe.size());
  const auto fits = [&](std::int64_t step) {
    for (std::int64_t l = 0; l < count; ++l) {
      if (moe[static_cast<std::size_t>(l)] != (l % step == step - 1)) return false;
    }
    return true;
  };
  if (fits(before)) return before;
  for (std::int64_t step = 1; step <= count + 1; ++step) {
    if (fits(step)) return step;
  }
  return std::nullopt;
}

void set_llama4_layers(Json& text, const std::vector<LayerSpec>& layers) {
  Json moe = Json::array(), rope = Json::array(), types = Json::array();
  std::vector<bool> is_moe;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    if (layers[l].moe) moe.push_back(l);
    rope.push_back(layers[l].rope ? 1 : 0);
    types.push_back(layers[l].attention_chunk > 0 ? "chunked_attention" : "full_attention");
    is_moe.push_back(layers[l].moe);
  }
  text["moe_layers"] = std::move(moe);
  text["no_rope_layers"] = std::move(rope);
  text["layer_types"] = std::move(types);
  // The lists decide; the interval is for readers that know no list. Where no interval says it,
  // what is there stays.
  const std::int64_t before =
      text.contains("interleave_moe_layer_step") && text["interleave_moe_layer_step"].is_number()
          ? text["interleave_moe_layer_step"].get<std::int64_t>()
          : 1;
  if (const auto step = moe_step(is_moe, before)) text["interleave_moe_layer_step"] = *step;
}

bool same(const LayerSpec& a, const LayerSpec& b) {
  return a.moe == b.moe && a.rope == b.rope && a.attention_chunk == b.attention_chunk;
}

}  // namespace

std::vector<std::int64_t> choose_layers(const ModelSpec& spec, const std::string& text) {
  const std::int64_t count = spec.layer_count();
  if (const auto number = number_of(text)) {
    if (*number < 1 || *number > count) {
      refuse(text + " layers are asked for, the model has " + std::to_string(count), count);
    }
    return first_layers(spec, *number);
  }
  std::vector<std::int64_t> out;
  for (const std::string& piece : split(text, ',')) {
    const std::size_t dash = piece.find('-');
    const auto first = number_of(piece.substr(0, dash));
    const auto last = dash == std::string::npos ? first : number_of(piece.substr(dash + 1));
    if (!first || !last || *first > *last) {
      refuse("'" + text + "' is no count and no list of layers", count);
    }
    if (*last >= count) {
      refuse("layer " + std::to_string(*last) + " is asked for, the model has " +
                 std::to_string(count) + " (0 to " + std::to_string(count - 1) + ")",
             count);
    }
    for (std::int64_t l = *first; l <= *last; ++l) out.push_back(l);
  }
  constexpr std::size_t kLayersMax = 10'000;  // as of any model
  if (out.size() > kLayersMax) refuse(count_text(10'000) + " layers are the most", count);
  return out;
}

Json config_of_layers(const Json& config, const std::vector<std::int64_t>& layers,
                      const std::string& where) {
  const ModelSpec whole = model_spec_from_config(config, where);
  std::vector<LayerSpec> wanted;
  for (const std::int64_t layer : layers) {
    TAILOR_CHECK(layer >= 0 && layer < whole.layer_count());
    wanted.push_back(whole.layers[static_cast<std::size_t>(layer)]);
  }
  Json out = config;
  Json& text = config.at("model_type") == "llama4" ? out.at("text_config") : out;
  text["num_hidden_layers"] = wanted.size();
  if (whole.family == Family::llama4) {
    set_llama4_layers(text, wanted);
  } else if (whole.family == Family::deepseek_v3) {
    const auto dense = std::count_if(wanted.begin(), wanted.end(),
                                     [](const LayerSpec& layer) { return !layer.moe; });
    const bool dense_first = std::is_partitioned(wanted.begin(), wanted.end(),
                                                 [](const LayerSpec& layer) { return !layer.moe; });
    if (!dense_first || dense == static_cast<std::ptrdiff_t>(wanted.size())) {
      refuse(
          "deepseek_v3 has its dense layers before its mixtures of experts, and one of those at "
          "least",
          whole.layer_count());
    }
    text["first_k_dense_replace"] = dense;
    text["num_nextn_predict_layers"] = 0;
  } else if (text.contains("layer_types") &&
             text["layer_types"].size() == static_cast<std::size_t>(whole.layer_count())) {
    Json types = Json::array();
    for (const std::int64_t layer : layers) {
      types.push_back(config.at("layer_types").at(static_cast<std::size_t>(layer)));
    }
    text["layer_types"] = std::move(types);
  }
  const ModelSpec made = model_spec_from_config(out, where);
  TAILOR_CHECK(
      std::equal(made.layers.begin(), made.layers.end(), wanted.begin(), wanted.end(), same),
      "the reduced config does not describe the wanted layers");
  return out;
}

}  // namespace tailor
