#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/checkpoint/checkpoint.h"
#include "data/checkpoint/model_spec.h"
#include "data/store/layout.h"

namespace tailor {

/// The forms a checkpoint's matrices are published in. With config.json and the formats asked for
/// a store's layout follows from them, so they are kept with a store that is begun: the shards may
/// be gone when it is gone on with.
struct SourceForms {
  bool experts_fused = false;
  std::vector<WeightFormat> of_matrix;  ///< unit by unit and matrix by matrix, as make_layout asks
  bool operator==(const SourceForms&) const = default;
};

/// Throws Error{bad_file}: not as many forms as the model has matrices.
StoreLayout layout_of(const ModelSpec& spec, const StoreFormats& formats, const SourceForms& forms);

/// Of a whole checkpoint; throws as find_source.
SourceForms find_forms(const Checkpoint& checkpoint, const ModelSpec& spec);

/// Of one that is still arriving: a matrix that is not there yet is taken to be as those of its
/// role and shape that are, if the index names the same scales beside it. Nothing while some role
/// has none to go by; `awaited` is then the name of one. Only for the final norm and the
/// vocabulary's matrices, of which there are no others, config.json's dtype will do.
std::optional<SourceForms> promised_forms(const Checkpoint& checkpoint, const ModelSpec& spec,
                                          const Json& config, std::string& awaited);

Json forms_json(const SourceForms& forms);
/// Throws Error{bad_file}.
SourceForms read_forms(const Json& json, const std::string& where);

}  // namespace tailor
