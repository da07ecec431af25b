#pragma once

#include <optional>
#include <string>

#include "base/file.h"

namespace tailor {

/// The formats of the base that an adapter of ours was trained on: base_record.json in its folder,
/// beside PEFT's files, which do not say it. Other programs' adapters have none. Which base it was
/// says the fingerprint in the factors' file (peft_folder.h).
struct BaseRecord {
  std::string experts = "as_is";  ///< format the routed experts were in: as_is, int4, nf4, ...
  std::string others = "as_is";   ///< of attention, dense MLPs, shared experts
  /// Whether training saw other numbers than the published ones.
  bool quantised() const;
  /// "experts int4, the rest as published"
  std::string text() const;
};
constexpr const char* kBaseRecordName = "base_record.json";

/// Throws Error{bad_file} where there is one that cannot be read.
std::optional<BaseRecord> read_base_record(const fs::path& adapter);
/// Atomically.
void write_base_record(const fs::path& adapter, const BaseRecord& record);

}  // namespace tailor
