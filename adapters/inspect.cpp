#include "adapters/inspect.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <string_view>
#include <tuple>

#include "base/error.h"

namespace tailor {
namespace {

/// "model.layers.12.self_attn.q_proj" -> 12 and "self_attn.q_proj".
void set_place(AdaptedMatrix& matrix) {
  constexpr std::string_view kLayers = ".layers.";
  matrix.target = matrix.module;
  const std::size_t at = matrix.module.find(kLayers);
  if (at == std::string::npos) return;
  const char* first = matrix.module.data() + at + kLayers.size();
  const char* last = matrix.module.data() + matrix.module.size();
  int layer = 0;
  const auto [end, error] = std::from_chars(first, last, layer);
  if (error != std::errc() || end == last || *end != '.') return;
  matrix.layer = layer;
  matrix.target.assign(end + 1, last);
}

/// "a.experts.7.gate_proj" -> "a.experts.gate_proj" and 7.
struct ExpertName {
  std::string module;
  std::int64_t expert;
};
std::optional<ExpertName> one_expert(const std::string& module) {
  constexpr std::string_view kExperts = ".experts.";
  const std::size_t at = module.find(kExperts);
  if (at == std::string::npos) return std::nullopt;
  const char* first = module.data() + at + kExperts.size();
  const char* last = module.data() + module.size();
  std::int64_t expert = 0;
  const auto [end, error] = std::from_chars(first, last, expert);
  if (error != std::errc() || end == last || *end != '.') return std::nullopt;
  return ExpertName{module.substr(0, at + kExperts.size()) + std::string(end + 1, last), expert};
}

/// What the file's name of a fused pair stands for; see PeftReader::fused_key. Alone in its module,
/// the config's parameters tell.
std::string fused_name(const PeftFolder& folder, const std::string& module) {
  constexpr std::string_view kInner = ".base_layer";
  if (module.ends_with(kInner))
    return module.substr(0, module.size() - kInner.size()) + ".gate_up_proj";
  if (folder.find(module + std::string(kInner)) != nullptr) return module + ".down_proj";
  for (const std::string& parameter : folder.config().target_parameters) {
    for (const char* name : {".gate_up_proj", ".down_proj"}) {
      const std::string full = module + name;
      if (full == parameter || full.ends_with("." + parameter)) return full;
    }
  }
  return module;
}

bool is_fused(const std::string& module) {
  return module.ends_with(".experts") || module.ends_with(".experts.base_layer");
}

/// A matrix whose factors lie in `pairs`, one for each expert, or in one pair for all of them.
AdaptedMatrix stored_matrix(const PeftFolder& folder, const std::string& module,
                            const std::vector<const StoredPair*>& pairs, std::int64_t experts,
                            std::int64_t rank) {
  AdaptedMatrix out;
  out.module = module;
  set_place(out);
  out.experts = experts;
  out.rank = rank;
  out.in = pairs.front()->a.shape[1];
  out.out = pairs.front()->b.shape[0];
  out.alpha = folder.config().alpha_of(module);
  out.scale = folder.config().scale(out.alpha, rank);
  for (const StoredPair* pair : pairs) {
    out.parameters += pair->a.elements() + pair->b.elements();
  }
  const std::int64_t each = experts / static_cast<std::int64_t>(pairs.size());
  out.load = [&folder, pairs, rank, each, in = out.in, width = out.out] {
    const auto count = static_cast<std::int64_t>(pairs.size()) * each * rank;
    LoadedFactors factors{std::vector<float>(static_cast<std::size_t>(count * in)),
                          std::vector<float>(static_cast<std::size_t>(count * width))};
    float *a = factors.a.data(), *b = factors.b.data();
    for (const StoredPair* pair : pairs) {
      folder.rows(pair->a, 0, each * rank, a);
      folder.unfold(pair->b, rank, each, 0, each, b);
      a += each * rank * in;
      b += each * rank * width;
    }
    return factors;
  };
  return out;
}

[[noreturn]] void refuse(const PeftFolder& folder, const std::string& module,
                         const std::string& what, const std::string& mend) {
  throw Error(Fault::bad_file, {what, folder.file_path().string() + ", " + module, mend});
}

}  // namespace

std::vector<AdaptedMatrix> matrices_as_stored(const PeftFolder& folder) {
  std::vector<AdaptedMatrix> out;
  std::map<std::string, std::map<std::int64_t, const StoredPair*>> by_expert;
  for (const auto& [module, pair] : folder.pairs()) {
    if (const std::optional<ExpertName> name = one_expert(module)) {
      by_expert[name->module][name->expert] = &pair;
      continue;
    }
    const std::int64_t rows = pair.a.shape[0];
    const std::string name = is_fused(module) ? fused_name(folder, module) : module;
    const std::int64_t rank = is_fused(module) ? folder.config().rank_of(name) : rows;
    if (rank < 1 || rows % rank != 0 || pair.b.shape[1] != rows) {
      refuse(folder, module,
             "factors of shape " + pair.a.shape_text() + " and " + pair.b.shape_text() +
                 " are no pair of rank " + std::to_string(rank),
             "The factors and adapter_config.json do not belong together; save the adapter again.");
    }
    out.push_back(stored_matrix(folder, name, {&pair}, rows / rank, rank));
  }
  for (const auto& [module, experts] : by_expert) {
    std::vector<const StoredPair*> pairs;
    const StoredPair& first = *experts.begin()->second;
    for (const auto& [expert, pair] : experts) {
      if (pair->a.shape != first.a.shape || pair->b.shape != first.b.shape ||
          pair->a.shape[0] != pair->b.shape[1]) {
        refuse(folder, module,
               "factors of expert " + std::to_string(expert) + " have shape " +
                   pair->a.shape_text() + " and " + pair->b.shape_text() + ", those of expert " +
                   std::to_string(experts.begin()->first) + " " + first.a.shape_text() + " and " +
                   first.b.shape_text(),
               "Pad the experts' factors with zeros to one rank.");
      }
      pairs.push_back(pair);
    }
    const auto count = static_cast<std::int64_t>(pairs.size());
    out.push_back(stored_matrix(folder, module, pairs, count, first.a.shape[0]));
  }
  std::sort(out.begin(), out.end(), [](const AdaptedMatrix& x, const AdaptedMatrix& y) {
    return std::tie(x.layer, x.module) < std::tie(y.layer, y.module);
  });
  return out;
}

std::vector<AdaptedMatrix> matrices_of_model(const PeftReader& reader) {
  std::vector<AdaptedMatrix> out;
  for (const LoraSite& site : reader.sites()) {
    AdaptedMatrix matrix;
    matrix.module = site.module;
    if (site.projection == Projection::experts_gate_up) matrix.module += ".gate_up_proj";
    if (site.projection == Projection::experts_down) matrix.module += ".down_proj";
    set_place(matrix);
    matrix.experts = site.experts;
    matrix.rank = site.rank;
    matrix.in = site.in;
    matrix.out = site.out;
    matrix.alpha = site.alpha;
    matrix.scale = site.scale;
    matrix.parameters = site.a_size() + site.b_size();
    matrix.load = [&reader, site] { return reader.read(site); };
    out.push_back(std::move(matrix));
  }
  return out;
}

namespace {

/// In eight sums side by side, so that no addition waits for the one before.
double dot(const float* x, const float* y, std::int64_t count) {
  std::array<double, 8> sums{};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (std::size_t k = 0; k < 8; ++k) {
      const auto j = static_cast<std::size_t>(i) + k;
      sums[k] += static_cast<double>(x[j]) * static_cast<double>(y[j]);
    }
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

/// Of one expert, without the scales.
double expert_product(const AdaptedMatrix& x, const LoadedFactors& fx, const AdaptedMatrix& y,
                      const LoadedFactors& fy, std::int64_t expert) {
  double sum = 0;
  for (std::int64_t r = expert * x.rank; r < (expert + 1) * x.rank; ++r) {
    for (std::int64_t s = expert * y.rank; s < (expert + 1) * y.rank; ++s) {
      sum += dot(fx.a.data() + r * x.in, fy.a.data() + s * y.in, x.in) *
             dot(fx.b.data() + r * x.out, fy.b.data() + s * y.out, x.out);
    }
  }
  return sum;
}

}  // namespace

double inner_product(const AdaptedMatrix& x, const LoadedFactors& factors_x, const AdaptedMatrix& y,
                     const LoadedFactors& factors_y) {
  TAILOR_CHECK(x.experts == y.experts && x.in == y.in && x.out == y.out);
  double sum = 0;
  for (std::int64_t e = 0; e < x.experts; ++e) sum += expert_product(x, factors_x, y, factors_y, e);
  return sum * x.scale * y.scale;
}

ChangeOfMatrix change_of(const AdaptedMatrix& matrix) {
  const LoadedFactors factors = matrix.load();
  ChangeOfMatrix out;
  double squares = 0;
  for (std::int64_t e = 0; e < matrix.experts; ++e) {
    const double own = std::max(0.0, expert_product(matrix, factors, matrix, factors, e));
    if (own > 0) ++out.experts_used;
    squares += own;
  }
  out.norm = std::fabs(matrix.scale) * std::sqrt(squares);
  return out;
}

AdapterDifference compare(const std::vector<AdaptedMatrix>& here,
                          const std::vector<AdaptedMatrix>& there, const std::string& where) {
  AdapterDifference out;
  double here_squares = 0, there_squares = 0, product = 0;
  std::map<std::string, const AdaptedMatrix*> others;
  for (const AdaptedMatrix& matrix : there) others[matrix.module] = &matrix;
  for (const AdaptedMatrix& matrix : here) {
    const LoadedFactors factors = matrix.load();
    const double own = inner_product(matrix, factors, matrix, factors);
    here_squares += own;
    const auto found = others.find(matrix.module);
    if (found == others.end()) {
      out.only_here.push_back(matrix.module);
      continue;
    }
    const AdaptedMatrix& other = *found->second;
    if (other.experts != matrix.experts || other.in != matrix.in || other.out != matrix.out) {
      throw Error(Fault::bad_file,
                  {"the two adapters have other shapes at " + matrix.module, where,
                   "They belong to different base models, or their files have different layouts: "
                   "name the model they belong to with --base."});
    }
    const LoadedFactors other_factors = other.load();
    const double others_own = inner_product(other, other_factors, other, other_factors);
    const double both = inner_product(matrix, factors, other, other_factors);
    there_squares += others_own;
    product += both;
    others.erase(found);
    AdapterDifference::Matrix line;
    line.module = matrix.module;
    line.norm_here = std::sqrt(std::max(0.0, own));
    line.norm_there = std::sqrt(std::max(0.0, others_own));
    if (own > 0 && others_own > 0) line.cosine = both / (line.norm_here * line.norm_there);
    const double apart = std::sqrt(std::max(0.0, own + others_own - 2 * both));
    line.relative = others_own > 0 ? apart / line.norm_there : own > 0 ? INFINITY : 0;
    out.matrices.push_back(line);
  }
  for (const auto& [module, matrix] : others) {
    const LoadedFactors factors = matrix->load();
    there_squares += inner_product(*matrix, factors, *matrix, factors);
    out.only_there.push_back(module);
  }
  if (here_squares > 0 && there_squares > 0)
    out.cosine = product / std::sqrt(here_squares * there_squares);
  const double apart = std::max(0.0, here_squares + there_squares - 2 * product);
  out.relative = there_squares > 0  ? std::sqrt(apart / there_squares)
                 : here_squares > 0 ? INFINITY
                                    : 0;
  return out;
}

std::string bars(const std::vector<double>& values) {
  constexpr std::array<const char*, 8> kHeights = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  double largest = 0;
  for (const double value : values) largest = std::max(largest, value);
  std::string out;
  for (const double value : values) {
    if (value < 0) {
      out += "·";
    } else if (value == 0) {
      out += "0";
    } else {
      const auto height = static_cast<std::size_t>(std::ceil(8 * value / largest));
      out += kHeights[std::clamp<std::size_t>(height, 1, 8) - 1];
    }
  }
  return out;
}

}  // namespace tailor
