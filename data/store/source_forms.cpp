#include "data/store/source_forms.h"

#include <map>
#include <tuple>

#include "base/error.h"
#include "base/units.h"
#include "data/store/source_form.h"

namespace tailor {
namespace {

constexpr std::size_t kFormsMax = std::size_t{1} << 24;

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(Fault::bad_file, {what, where, "Pack the model again, into a new folder."});
}

/// Forms in the order of a model's matrices.
template <class FormOf>
std::vector<WeightFormat> each_form(const ModelSpec& spec, bool experts_fused,
                                    const FormOf& form_of) {
  std::vector<WeightFormat> out;
  static_cast<void>(
      make_layout(spec, StoreFormats{}, experts_fused, [&](const PublishedMatrix& matrix) {
        out.push_back(form_of(matrix));
        return out.back();
      }));
  return out;
}

/// How the index spells a matrix: what stands beside its codes.
enum class Spelling { plain, block_scales, output_scales, packed };

Spelling spelling_of(const Checkpoint& checkpoint, const PublishedMatrix& matrix) {
  if (checkpoint.promises(module_of(matrix.name) + ".weight_packed")) return Spelling::packed;
  for (const std::string& name : scale_names(matrix.name)) {
    if (!checkpoint.promises(name)) continue;
    return name.ends_with("_inv") ? Spelling::block_scales : Spelling::output_scales;
  }
  return Spelling::plain;
}

WeightFormat form_of_dtype(const Json& config) {
  const Json& text = config.contains("text_config") ? config["text_config"] : config;
  for (const Json* from : {&text, &config}) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (!from->is_object() || !from->contains(key) || !(*from)[key].is_string()) continue;
      return (*from)[key] == "bfloat16" ? WeightFormat::bf16() : WeightFormat::f32();
    }
  }
  return WeightFormat::bf16();
}

using Kind = std::tuple<MatrixRole, std::int64_t, std::int64_t, Spelling>;

MatrixRole likeness(MatrixRole role) {
  switch (role) {
    case MatrixRole::embedding:
      return MatrixRole::head;
    case MatrixRole::head:
      return MatrixRole::embedding;
    case MatrixRole::final_norm:
      return MatrixRole::input_norm;
    default:
      return role;
  }
}

}  // namespace

StoreLayout layout_of(const ModelSpec& spec, const StoreFormats& formats,
                      const SourceForms& forms) {
  std::size_t next = 0;
  const std::string what = "a store of another model: its matrices are not those of config.json";
  StoreLayout out =
      make_layout(spec, formats, forms.experts_fused, [&](const PublishedMatrix& matrix) {
        if (next == forms.of_matrix.size()) refuse(what, matrix.name);
        return forms.of_matrix[next++];
      });
  if (next != forms.of_matrix.size()) refuse(what, "config.json");
  return out;
}

SourceForms find_forms(const Checkpoint& checkpoint, const ModelSpec& spec) {
  SourceForms out;
  out.experts_fused =
      experts_are_fused(spec, [&](const std::string& name) { return checkpoint.has(name); });
  out.of_matrix = each_form(spec, out.experts_fused, [&](const PublishedMatrix& matrix) {
    return published_format(checkpoint, matrix);
  });
  return out;
}

std::optional<SourceForms> promised_forms(const Checkpoint& checkpoint, const ModelSpec& spec,
                                          const Json& config, std::string& awaited) {
  SourceForms out;
  out.experts_fused =
      experts_are_fused(spec, [&](const std::string& name) { return checkpoint.promises(name); });
  std::map<Kind, WeightFormat> known;
  const auto kind_of = [&](const PublishedMatrix& matrix) {
    return Kind{matrix.role, matrix.rows, matrix.columns, spelling_of(checkpoint, matrix)};
  };
  const auto arrived = [&](const PublishedMatrix& matrix) {
    return checkpoint.arrived_with_companions(matrix.name);
  };
  static_cast<void>(each_form(spec, out.experts_fused, [&](const PublishedMatrix& matrix) {
    if (!arrived(matrix)) return WeightFormat::bf16();
    const WeightFormat found = published_format(checkpoint, matrix);
    known.emplace(kind_of(matrix), found);
    return found;
  }));
  awaited.clear();
  out.of_matrix = each_form(spec, out.experts_fused, [&](const PublishedMatrix& matrix) {
    if (arrived(matrix)) return published_format(checkpoint, matrix);
    Kind kind = kind_of(matrix);
    auto found = known.find(kind);
    if (found != known.end()) return found->second;
    const MatrixRole alike = likeness(matrix.role);
    if (alike == matrix.role) {
      if (awaited.empty()) awaited = matrix.name;
      return WeightFormat::bf16();
    }
    std::get<MatrixRole>(kind) = alike;
    found = known.find(kind);
    return found != known.end() ? found->second : form_of_dtype(config);
  });
  if (!awaited.empty()) return std::nullopt;
  return out;
}

/// Neighbours of one form are written once: [kind, group, block rows, block columns, how many].
Json forms_json(const SourceForms& forms) {
  Json runs = Json::array();
  for (std::size_t begin = 0, end = 0; begin < forms.of_matrix.size(); begin = end) {
    const WeightFormat& form = forms.of_matrix[begin];
    while (end < forms.of_matrix.size() && forms.of_matrix[end] == form) ++end;
    runs.push_back({static_cast<std::uint32_t>(form.kind), form.group, form.block_rows,
                    form.block_columns, end - begin});
  }
  return {{"experts_fused", forms.experts_fused}, {"matrices", std::move(runs)}};
}

SourceForms read_forms(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  SourceForms out;
  out.experts_fused = reader.boolean("experts_fused", false);
  for (const Json& run : reader.at("matrices")) {
    std::int64_t numbers[5] = {};
    bool fine = run.is_array() && run.size() == 5;
    for (std::size_t i = 0; fine && i < 5; ++i) {
      fine = run[i].is_number_integer();
      if (fine) numbers[i] = run[i].get<std::int64_t>();
    }
    fine = fine && numbers[0] >= 0 && numbers[0] <= static_cast<std::int64_t>(WeightKind::nf4) &&
           numbers[4] > 0 && numbers[4] <= narrow<std::int64_t>(kFormsMax - out.of_matrix.size());
    const WeightFormat form{static_cast<WeightKind>(numbers[0]), numbers[1], numbers[2],
                            numbers[3]};
    if (!fine || !matrix_possible(form, 1, 1)) refuse("the forms of matrices are damaged", where);
    out.of_matrix.insert(out.of_matrix.end(), static_cast<std::size_t>(numbers[4]), form);
  }
  return out;
}

}  // namespace tailor
