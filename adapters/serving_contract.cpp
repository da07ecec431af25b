#include <cstdio>
#include <tuple>

#include "adapters/serving.h"
#include "base/error.h"
#include "base/text.h"

namespace tailor {
namespace {

constexpr std::int64_t kVllmRankMax = 512;

[[noreturn]] void refuse(const PeftReader& reader, const LoraSite& site, const std::string& what,
                         const std::string& mend) {
  throw Error(Fault::bad_file, {what, reader.weights_path().string() + ", " + site.module, mend});
}

void check_server(const PeftReader& reader, const LoraSite& site, const ModelSpec& spec,
                  const char* name, bool vllm) {
  const std::string merge =
      "Merge it into the base and serve that: tailor merge. Or train other targets.";
  if (site.is_experts() && spec.family == Family::llama4) {
    refuse(reader, site,
           std::string(name) +
               " applies LoRA of Llama 4's routed experts wrongly: its router "
               "scales an expert's input, and there the factors do not see that",
           "Merge it into the base and serve that: tailor merge. Factors on attention and the "
           "shared expert alone can be served as an adapter.");
  }
  if (vllm && site.rank > kVllmRankMax) {
    refuse(reader, site,
           "rank " + std::to_string(site.rank) + " is above the " + std::to_string(kVllmRankMax) +
               " that vLLM takes",
           merge);
  }
  if (vllm && site.projection == Projection::kv_b_proj) {
    refuse(
        reader, site,
        "vLLM folds kv_b_proj into attention and ignores factors on it: it would load and change "
        "nothing",
        merge);
  }
  if (!vllm && site.projection == Projection::router) {
    refuse(reader, site, "SGLang has no LoRA on routers", merge);
  }
}

void check_peft(const PeftReader& reader, const LoraSite& site, const ModelSpec& spec,
                const std::string& version) {
  if (site.projection == Projection::router && spec.family == Family::llama4) {
    refuse(reader, site,
           "PEFT has no LoRA on Llama 4's router, which is no plain linear layer there",
           "Merge it into the base: tailor merge. Or train other targets.");
  }
  const bool parameters = peft_version_parts(version) >= std::tuple(0, 17, -1);
  if (site.is_experts() && !parameters) {
    refuse(reader, site, "PEFT " + version + " has no LoRA on experts held as one parameter",
           "Export for PEFT 0.17.0 or newer, or merge it into the base: tailor merge.");
  }
}

}  // namespace

ServingTarget serving_target_from_text(const std::string& text) {
  const std::size_t at = text.find('@');
  const std::string name = text.substr(0, at);
  const std::vector<std::string> known = {"vllm", "sglang", "peft"};
  if (name != "vllm" && name != "sglang" && name != "peft") {
    const std::string near = nearest_name(name, known);
    throw Error(Fault::usage, {"'" + name + "' is no value of --for", "--for",
                               (near.empty() ? "" : "Did you mean " + near + "? ") +
                                   "Use vllm, sglang, peft, or peft@VERSION."});
  }
  ServingTarget out;
  out.server = name == "vllm" ? Server::vllm : name == "sglang" ? Server::sglang : Server::peft;
  if (at == std::string::npos) return out;
  const std::string version = text.substr(at + 1);
  if (out.server != Server::peft) {
    throw Error(Fault::usage,
                {"--for " + name + " takes no version", "--for",
                 "Only PEFT's layouts changed with its versions: use --for " + name + "."});
  }
  int major = 0, minor = 0, used = 0;
  if (std::sscanf(version.c_str(), "%d.%d%n", &major, &minor, &used) != 2 || used == 0) {
    throw Error(Fault::usage, {"'" + version + "' is no version of PEFT", "--for",
                               "Write it as in peft@0.18.1."});
  }
  out.version = version;
  return out;
}

void check_serving_contract(const PeftReader& reader, const ModelSpec& spec,
                            const ServingTarget& target) {
  for (const LoraSite& site : reader.sites()) {
    if (target.server == Server::peft) {
      check_peft(reader, site, spec, target.version);
    } else {
      const bool vllm = target.server == Server::vllm;
      check_server(reader, site, spec, vllm ? "vLLM" : "SGLang", vllm);
    }
  }
  if (target.server != Server::sglang || spec.family != Family::llama4) return;
  for (const LoraSite& site : reader.sites()) {  // after what is worse
    if (site.projection != Projection::q_proj && site.projection != Projection::k_proj) continue;
    refuse(
        reader, site,
        "SGLang reorders the rows of Llama 4's q_proj and k_proj as it loads them, and not those "
        "of LoRA on them",
        "Merge it into the base and serve that: tailor merge. Or train v_proj, o_proj and the "
        "shared expert alone.");
  }
}

}  // namespace tailor
