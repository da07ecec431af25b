#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "data/quant/format.h"

namespace tailor {

/// A linear layer of an exported checkpoint, and the form its weight has there.
struct ExportedLinear {
  std::string module;   ///< "model.layers.3.feed_forward.experts.17.up_proj"
  std::string experts;  ///< "model.layers.3.feed_forward.experts" of a routed expert's, else empty
  std::string projection;  ///< "up_proj" of a routed expert's, else empty
  WeightFormat format;     ///< f32 and bf16: not quantised
};

/// How the quantised linears of a checkpoint are published as a whole: "fp8" where all of them are
/// fp8 in blocks of 128 x 128, as DeepSeek publishes; else compressed-tensors' "pack-quantized"
/// (int4), "float-quantized" (fp8) or "mixed-precision" (both). Empty: nothing is quantised.
std::string quantization_format(const std::vector<ExportedLinear>& linears);

/// `quantization_config` of config.json; null where nothing is quantised. Every linear that is not
/// quantised is named: vLLM and transformers quantise what is not. `wrapper`: the config is of
/// Llama 4's multimodal model, whose other towers are not quantised either.
Json quantization_config(const std::vector<ExportedLinear>& linears, bool wrapper);

}  // namespace tailor
