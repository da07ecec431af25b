#include "adapters/peft_files.h"

#include <array>
#include <cstdio>
#include <optional>

#include "adapters/peft_reader.h"
#include "adapters/peft_writer.h"
#include "base/error.h"

namespace tailor {

std::tuple<int, int, int> peft_version_parts(const std::string& version) {
  std::array<int, 3> parts = {-1, -1, -1};
  std::sscanf(version.c_str(), "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
  return {parts[0], parts[1], parts[2]};
}

ExpertLayout peft_layout(Family family, const std::string& peft_version) {
  const bool held_inputs_first = family == Family::llama4;
  const bool read_inputs_first = peft_version_parts(peft_version) < std::tuple(0, 19, 1);
  return held_inputs_first == read_inputs_first ? ExpertLayout::straight : ExpertLayout::swapped;
}

ExpertLayout detect_expert_layout(const ModelSpec& spec, std::int64_t gate_up_a_columns,
                                  std::int64_t down_a_columns, const std::string& peft_version,
                                  const std::string& where) {
  const std::int64_t D = spec.hidden, F = spec.expert_width;
  // Columns of A: its input when straight, its output when swapped.
  const auto decide = [](std::int64_t columns, std::int64_t in,
                         std::int64_t out) -> std::optional<ExpertLayout> {
    if (columns == 0 || in == out) return std::nullopt;
    if (columns == in) return ExpertLayout::straight;
    if (columns == out) return ExpertLayout::swapped;
    return std::nullopt;
  };
  if (const auto layout = decide(gate_up_a_columns, D, 2 * F)) return *layout;
  if (const auto layout = decide(down_a_columns, F, D)) return *layout;
  if (std::get<1>(peft_version_parts(peft_version)) >= 0)
    return peft_layout(spec.family, peft_version);
  throw Error(Fault::bad_file,
              {"which side of the experts' factors is the input cannot be told", where,
               "PEFT changed this between versions. Add the version that wrote the file to "
               "adapter_config.json as \"peft_version\"."});
}

Adapter read_peft_adapter(const PeftReader& reader) {
  reader.check_finite();
  Adapter adapter =
      Adapter::from_sites({reader.sites().begin(), reader.sites().end()}, reader.options());
  for (const LoraSite& site : adapter.sites()) {
    reader.read(site, 0, site.experts, adapter.a_of(site).data(), adapter.b_of(site).data());
  }
  return adapter;
}

Adapter read_peft_adapter(const fs::path& folder, const ModelSpec& spec) {
  return read_peft_adapter(PeftReader(folder, spec));
}

void write_peft_adapter(const fs::path& folder, const Adapter& adapter, const ModelSpec& spec,
                        const PeftWriteOptions& options) {
  make_folders(folder);
  const FactorsOf factors = [&](const LoraSite& site) {
    return SiteFactors{adapter.a_of(site), adapter.b_of(site)};
  };
  write_adapter_files(
      folder,
      fused_tensors(adapter.sites(), factors, peft_layout(spec.family, kPeftVersion),
                    options.module_prefix, Dtype::f32),
      peft_config(adapter.sites(), spec, options.base_model, kPeftVersion,
                  adapter.options().dropout, adapter.options().rslora),
      options.base_fingerprint);
}

}  // namespace tailor
