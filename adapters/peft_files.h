#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "adapters/lora.h"
#include "base/file.h"

namespace tailor {

class PeftReader;

/// PEFT adapter folders: adapter_config.json and adapter_model.safetensors.
///
/// PEFT keeps the experts of a layer as one 3-D parameter and its two factors flattened:
/// A rows expert-major [E * r, .], B columns rank-major with the expert fastest [., r * E]. Which
/// side is the input changed between its versions for Llama 4, whose experts are stored
/// [E, in, out]: up to 0.19.0 A was on the input ("straight"), from 0.19.1 on it is on the output
/// ("swapped": A' = B_e^T, B' = A_e^T). The product is the same, so both read without loss.
enum class ExpertLayout {
  swapped,    ///< PEFT >= 0.19.1; what we write
  straight,   ///< PEFT 0.17 - 0.19.0, and vLLM's 3-D layout
  per_expert  ///< experts.N.{gate,up,down}_proj, 2-D each: vLLM's default, SGLang
};

/// The PEFT version whose layout we write into adapter_config.json.
inline constexpr const char* kPeftVersion = "0.21.2";

/// "0.19.1" -> (0, 19, 1); missing or odd parts are -1.
std::tuple<int, int, int> peft_version_parts(const std::string& version);

/// The layout of experts in files of a PEFT version. It takes a parameter's second dimension for
/// the input up to 0.19.0, and for the output from 0.19.1 on; transformers holds Llama 4's experts
/// inputs first, and the other families' outputs first.
ExpertLayout peft_layout(Family family, const std::string& peft_version);

/// Reads any of the layouts above. The layout is told by the shapes of gate_up's factors, else of
/// down's, else by `peft_version`; where none of these decides it is refused. Throws
/// Error{bad_file}: factors that belong to no matrix of the model, wrong shapes, ranks that are not
/// the config's (which decide the scale), NaN; and as PeftFolder does.
Adapter read_peft_adapter(const fs::path& folder, const ModelSpec& spec);
Adapter read_peft_adapter(const PeftReader& reader);

struct PeftWriteOptions {
  std::string base_model;             ///< recorded as base_model_name_or_path
  std::string module_prefix;          ///< "language_model." for the multimodal wrapper, else empty
  std::string base_fingerprint = {};  ///< fingerprint() of the base; recorded where it is known
};

/// Writes the folder's two files atomically, each re-read and compared afterwards. The tensors
/// depend on the factors alone. Routed experts without factors get zeros at their site's rank,
/// since servers ask for every expert of a layer; read_peft_adapter() takes them for factors.
void write_peft_adapter(const fs::path& folder, const Adapter& adapter, const ModelSpec& spec,
                        const PeftWriteOptions& options);

/// The layout of a fused expert file, from shapes and version; see read_peft_adapter.
/// `gate_up_a_columns` and `down_a_columns`: columns of the A factors, 0 where there is none.
ExpertLayout detect_expert_layout(const ModelSpec& spec, std::int64_t gate_up_a_columns,
                                  std::int64_t down_a_columns, const std::string& peft_version,
                                  const std::string& where);

}  // namespace tailor
