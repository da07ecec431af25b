#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "adapters/lora.h"
#include "adapters/peft_files.h"
#include "adapters/peft_folder.h"
#include "base/json.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {

/// What write_peft_adapter() and the exports for servers are made of.

/// A site's factors when they are wanted: A [slots, rank, in], B [slots, rank, out]. `keep` holds
/// what they lie in, if anything must.
struct SiteFactors {
  std::span<const float> a, b;
  std::shared_ptr<const void> keep = {};
};
using FactorsOf = std::function<SiteFactors(const LoraSite&)>;

/// Floats as the bytes of F32 or, rounded to nearest, BF16.
std::vector<std::byte> factor_bytes(std::span<const float> x, Dtype dtype);
/// x[rows, columns] -> [columns, rows].
std::vector<float> transposed(std::span<const float> x, std::int64_t rows, std::int64_t columns);

/// The file's tensors by name, experts fused as `layout` says (not per_expert), each made when it
/// is written: factors may be larger than memory. `sites` must outlive the result.
std::vector<TensorToWrite> fused_tensors(std::span<const LoraSite> sites, const FactorsOf& factors,
                                         ExpertLayout layout, const std::string& module_prefix,
                                         Dtype dtype);

/// adapter_config.json of plain factors of one rank and alpha, target_modules still to be filled.
/// An alpha that is whole is written as such: servers read no other.
Json lora_config(const std::string& base_model, const std::string& version, std::int64_t rank,
                 double alpha);

/// adapter_config.json for PEFT: the most common rank and alpha, patterns for the others.
Json peft_config(std::span<const LoraSite> sites, const ModelSpec& spec,
                 const std::string& base_model, const std::string& version, double dropout,
                 bool rslora);

/// Writes the folder's two files atomically, and reads the tensors back to compare them. An empty
/// fingerprint is not recorded. `progress`: bytes done, of twice the tensors' bytes.
void write_adapter_files(const fs::path& folder, const std::vector<TensorToWrite>& tensors,
                         const Json& config, const std::string& base_fingerprint,
                         const std::function<void(std::int64_t done)>& progress = {});

}  // namespace tailor
