#include "adapters/serving.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <set>

#include "adapters/peft_writer.h"
#include "adapters/uniform_factors.h"
#include "base/error.h"
#include "base/staging_folder.h"
#include "base/text.h"

namespace tailor {
namespace {

/// One matrix as a server knows it, by the name of its module.
struct Named {
  std::string module;
  SitePart part;
};

SitePart whole(const LoraSite& site) { return {&site, 0, site.out, site.in, site.experts}; }

/// Matrices that servers hold as one, of which SGLang wants factors for all or none.
using P = Projection;
const std::vector<std::vector<Projection>> kTogether = {{P::q_proj, P::k_proj, P::v_proj},
                                                        {P::q_a_proj, P::kv_a_proj},
                                                        {P::gate_proj, P::up_proj},
                                                        {P::shared_gate_proj, P::shared_up_proj}};

/// The adapter's parts, experts' gate and up apart; with `complete` also zeros for what SGLang
/// wants beside them.
std::vector<Named> server_parts(std::span<const LoraSite> sites, const ModelSpec& spec,
                                bool complete) {
  std::vector<Named> out;
  std::set<std::pair<int, Projection>> have;
  for (const LoraSite& site : sites) {
    have.insert({site.layer, site.projection});
    if (site.projection == Projection::experts_gate_up) {
      const std::int64_t F = site.out / 2;
      out.push_back({site.module + ".gate_proj", {&site, 0, F, site.in, site.experts}});
      out.push_back({site.module + ".up_proj", {&site, F, F, site.in, site.experts}});
    } else if (site.projection == Projection::experts_down) {
      out.push_back({site.module + ".down_proj", whole(site)});
    } else {
      out.push_back({site.module, whole(site)});
    }
  }
  for (const LoraSite& site : all_sites(spec)) {
    if (have.contains({site.layer, site.projection})) continue;
    const bool other_half =
        site.is_experts() && (have.contains({site.layer, Projection::experts_gate_up}) ||
                              have.contains({site.layer, Projection::experts_down}));
    bool beside = false;
    for (const auto& group : kTogether) {
      if (std::find(group.begin(), group.end(), site.projection) == group.end()) continue;
      beside = std::any_of(group.begin(), group.end(), [&](Projection projection) {
        return have.contains({site.layer, projection});
      });
    }
    if (!other_half && !(complete && beside)) continue;
    // All three projections of an expert are wanted, by both servers.
    if (site.projection == Projection::experts_gate_up) {
      const SitePart half{nullptr, 0, site.out / 2, site.in, site.experts};
      out.push_back({site.module + ".gate_proj", half});
      out.push_back({site.module + ".up_proj", half});
    } else {
      const std::string name = site.is_experts() ? site.module + ".down_proj" : site.module;
      out.push_back({name, {nullptr, 0, site.out, site.in, site.experts}});
    }
  }
  return out;
}

/// "a.experts.gate_proj" and 7 -> "a.experts.7.gate_proj".
std::string of_expert(const std::string& module, std::int64_t expert) {
  const std::size_t dot = module.rfind('.');
  return module.substr(0, dot + 1) + std::to_string(expert) + module.substr(dot);
}

/// Where vLLM's order has the rows of a Llama 4's q and k: its rotary embedding wants a head's
/// pairs (2 j, 2 j + 1) at j and half a head + j, so that it reorders the base's rows as it loads
/// them, but not those of LoRA's B (0.32 and 0.33, llama4.py, permute_qk_weight_for_rotary).
bool rows_move(const SitePart& part, const ModelSpec& spec, Server server) {
  return server == Server::vllm && spec.family == Family::llama4 && part.site != nullptr &&
         (part.site->projection == Projection::q_proj ||
          part.site->projection == Projection::k_proj);
}
/// B [rank, out] with its outputs in that order.
std::vector<float> halves_of_pairs(std::span<const float> b_ro, std::int64_t out,
                                   std::int64_t head_dim) {
  std::vector<float> turned(b_ro.size());
  for (std::size_t i = 0; i < turned.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    const std::int64_t row = at % out, in_head = row % head_dim, half = head_dim / 2;
    const std::int64_t from = row - in_head + 2 * (in_head % half) + in_head / half;
    turned[i] = b_ro[static_cast<std::size_t>(at - row + from)];
  }
  return turned;
}

std::vector<TensorToWrite> server_tensors(const std::vector<Named>& parts, const ModelSpec& spec,
                                          UniformFactors& uniform, const ServingOptions& options) {
  std::vector<TensorToWrite> out;
  const std::int64_t rank = uniform.rank();
  const Dtype dtype = options.dtype;
  for (const Named& named : parts) {
    const SitePart part = named.part;
    const bool experts = named.module.find(".experts.") != std::string::npos;
    const bool moves = rows_move(part, spec, options.target.server);
    const std::int64_t head_dim = spec.head_dim;
    for (std::int64_t e = 0; e < part.experts; ++e) {
      const std::string key = std::string(kPeftKeyPrefix) + options.module_prefix +
                              (experts ? of_expert(named.module, e) : named.module);
      const auto slice = [e, rank](const std::vector<float>& x, std::int64_t wide) {
        return std::span(x).subspan(static_cast<std::size_t>(e * rank * wide),
                                    static_cast<std::size_t>(rank * wide));
      };
      out.push_back({key + ".lora_A.weight", dtype, {rank, part.in}, {}, [=, &uniform] {
                       const auto factors = uniform.of(part);
                       return factor_bytes(slice(factors->a, part.in), dtype);
                     }});
      out.push_back({key + ".lora_B.weight", dtype, {part.width, rank}, {}, [=, &uniform] {
                       const auto factors = uniform.of(part);
                       const auto b = slice(factors->b, part.width);
                       if (!moves) return factor_bytes(transposed(b, rank, part.width), dtype);
                       const auto turned = halves_of_pairs(b, part.width, head_dim);
                       return factor_bytes(transposed(turned, rank, part.width), dtype);
                     }});
    }
  }
  std::sort(out.begin(), out.end(), [](const auto& x, const auto& y) { return x.name < y.name; });
  return out;
}

std::string last_name(const std::string& module) { return module.substr(module.rfind('.') + 1); }

void check_disk(const fs::path& to, const std::vector<TensorToWrite>& tensors,
                std::int64_t& bytes) {
  for (const TensorToWrite& tensor : tensors) {
    std::int64_t own = dtype_bytes(tensor.dtype);
    for (const std::int64_t size : tensor.shape) own *= size;
    bytes += own;
  }
  std::error_code error;
  const fs::space_info space = fs::space(to, error);
  if (error || static_cast<std::int64_t>(space.available) >= bytes) return;
  throw Error(Fault::does_not_fit,
              {"the exported adapter takes " + bytes_text(bytes) + ", " +
                   bytes_text(static_cast<std::int64_t>(space.available)) + " are free",
               to.parent_path().string(), "Free the disk, or write it with --dtype bfloat16."});
}

/// What a server reads of adapter_config.json: one rank, one alpha, a list of names.
Json server_config(const std::vector<Named>& parts, const std::string& base_model,
                   std::int64_t rank, std::int64_t alpha) {
  std::set<std::string> names;
  for (const Named& named : parts) names.insert(last_name(named.module));
  Json config = lora_config(base_model, kPeftVersion, rank, static_cast<double>(alpha));
  config["target_modules"] = names;
  return config;
}

std::string counted_matrices(std::int64_t count) {
  return count == 1 ? "one matrix" : count_text(count) + " matrices";
}

void note_changes(const UniformFactors& uniform, const PeftReader& reader, ServingReport& report) {
  if (uniform.padded() > 0) {
    report.notes.push_back(counted_matrices(uniform.padded()) + " had another rank than " +
                           std::to_string(uniform.rank()) + ": rows of zeros fill up");
  }
  if (uniform.folded() > 0) {
    report.notes.push_back("the scale of " + counted_matrices(uniform.folded()) +
                           " is folded into B");
  }
  if (reader.options().rslora) {
    report.notes.push_back(
        "rsLoRA's scale, alpha / sqrt(rank), is written as alpha / rank with use_rslora off, which "
        "SGLang ignores");
  }
}

}  // namespace

ServingReport export_adapter(const PeftReader& reader, const ModelSpec& spec,
                             const ServingOptions& options, const fs::path& to) {
  check_serving_contract(reader, spec, options.target);
  reader.check_finite();
  StagingFolder staging(to.has_filename() ? to : to.parent_path());
  const std::string base_model =
      options.base_model.empty() ? reader.folder().config().base_model : options.base_model;
  const std::span<const LoraSite> sites = reader.sites();
  const bool experts = std::any_of(sites.begin(), sites.end(),
                                   [](const LoraSite& site) { return site.is_experts(); });
  ServingReport report;
  std::optional<UniformFactors> uniform;
  std::vector<LoraSite> written(sites.begin(), sites.end());  // with the ranks they will have
  std::vector<TensorToWrite> tensors;
  Json config;
  const auto parts_of = [](const std::vector<Named>& named) {
    std::vector<SitePart> out;
    for (const Named& one : named) out.push_back(one.part);
    return out;
  };
  if (options.target.server == Server::peft) {
    const ExpertLayout layout = peft_layout(spec.family, options.target.version);
    if (experts) report.layout = layout == ExpertLayout::straight ? "straight" : "swapped";
    FactorsOf factors = [&](const LoraSite& site) {
      const auto own = std::make_shared<const LoadedFactors>(reader.read(site));
      return SiteFactors{own->a, own->b, own};
    };
    if (options.uniform) {
      std::vector<Named> named;
      for (const LoraSite& site : sites) named.push_back({site.module, whole(site)});
      uniform.emplace(reader, parts_of(named));
      for (LoraSite& site : written) {
        site.rank = uniform->rank();
        site.scale = uniform->scale();
        site.alpha = site.scale * static_cast<double>(site.rank);
      }
      factors = [&](const LoraSite& site) {
        const auto own =
            uniform->of(whole(sites[static_cast<std::size_t>(&site - written.data())]));
        return SiteFactors{own->a, own->b, own};
      };
    }
    tensors = fused_tensors(written, factors, layout, options.module_prefix, options.dtype);
    config = peft_config(written, spec, base_model, options.target.version, 0,
                         !options.uniform && reader.options().rslora);
  } else {
    if (experts) report.layout = "one_by_one";
    const std::vector<Named> parts =
        server_parts(sites, spec, options.target.server == Server::sglang);
    uniform.emplace(reader, parts_of(parts));
    tensors = server_tensors(parts, spec, *uniform, options);
    const double alpha = uniform->scale() * static_cast<double>(uniform->rank());
    config = server_config(parts, base_model, uniform->rank(), std::llround(alpha));
    if (std::any_of(parts.begin(), parts.end(), [&](const Named& named) {
          return rows_move(named.part, spec, options.target.server);
        })) {
      config[kVllmRowsKey] = "vllm";  // so that nobody takes them for the adapter's own
      report.notes.push_back(
          "rows of q_proj's and k_proj's B are in vLLM's order, into which it brings the base's "
          "but "
          "not LoRA's: this folder is for vLLM alone");
    }
  }
  report.rank = config.at("r").get<std::int64_t>();
  report.alpha = config.at("lora_alpha").get<double>();
  report.tensors = static_cast<std::int64_t>(tensors.size());
  check_disk(staging.path(), tensors, report.bytes);
  write_adapter_files(staging.path(), tensors, config, reader.folder().base_fingerprint(),
                      [&](std::int64_t done) {
                        if (options.progress) options.progress(done, 2 * report.bytes);
                      });
  staging.publish();
  if (uniform) note_changes(*uniform, reader, report);
  return report;
}

}  // namespace tailor
