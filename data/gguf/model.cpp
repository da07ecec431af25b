#include "data/gguf/model.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "data/gguf/metadata.h"
#include "data/gguf/vocabulary.h"

namespace tailor {
namespace {

constexpr std::int64_t kElementsAtOnce = std::int64_t{1} << 22U;
constexpr const char* kRopeFactors = "rope_freqs.weight";

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::vector<std::string> sides;
  for (const std::int64_t side : shape) sides.push_back(std::to_string(side));
  return "[" + join(sides, ", ") + "]";
}

/// Layer of "blk.12.attn_q.weight", else -1.
std::int64_t layer_of(const std::string& tensor) {
  if (!tensor.starts_with("blk.")) return -1;
  const std::string number = tensor.substr(4, tensor.find('.', 4) - 4);
  const bool digits = !number.empty() && number.size() < 7 &&
                      std::all_of(number.begin(), number.end(),
                                  [](unsigned char c) { return c >= '0' && c <= '9'; });
  return digits ? std::stoll(number) : -1;
}

/// Before the matrices of all layers and experts are listed: what the file cannot have.
void check_counts(const ModelSpec& spec, std::size_t pairs, const GgufHeader& header,
                  const fs::path& path) {
  constexpr std::int64_t kExpertsMax = 1024;  // llama.cpp's own limit
  const auto refuse = [&](const std::string& what) {
    throw Error(Fault::bad_file, {what, path.string(), "The file is damaged: fetch it again."});
  };
  if (spec.layer_count() > static_cast<std::int64_t>(header.tensors.size())) {
    refuse("the model has " + std::to_string(spec.layer_count()) + " layers, the file " +
           std::to_string(header.tensors.size()) + " tensors");
  }
  if (spec.experts > kExpertsMax) {
    refuse("the model has " + std::to_string(spec.experts) + " experts a layer, the most is 1,024");
  }
  if (pairs != 0 && static_cast<std::int64_t>(2 * pairs) != spec.rope_width()) {
    refuse(std::string(kRopeFactors) + " has " + std::to_string(pairs) +
           " factors for heads of which " + std::to_string(spec.rope_width()) +
           " numbers are rotated");
  }
}

}  // namespace

std::optional<fs::path> find_gguf_file(const fs::path& model) {
  std::error_code error;
  if (fs::is_regular_file(model, error)) {
    if (model.extension() == ".gguf" || is_gguf_file(model)) return model;
    return std::nullopt;
  }
  if (!fs::is_directory(model, error) || fs::exists(model / "config.json", error))
    return std::nullopt;
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(model, error)) {
    if (entry.path().extension() == ".gguf") found.push_back(entry.path().filename());
  }
  if (found.empty()) return std::nullopt;
  std::sort(found.begin(), found.end());
  if (found.size() > 1) {
    found.resize(std::min<std::size_t>(found.size(), 8));
    throw Error(Fault::usage, {"the folder holds several GGUF files", model.string(),
                               "Name one of them: " + join(found, ", ") + "."});
  }
  return model / found.front();
}

GgufModel GgufModel::open(const fs::path& path) {
  GgufModel out(path);
  out.header_ = parse_gguf_header(out.file_.bytes(), path);
  const GgufValues values(out.header_, path.string());
  std::vector<float> factors;
  if (const auto found = out.header_.tensors.find(kRopeFactors);
      found != out.header_.tensors.end()) {
    const GgufTensor& tensor = found->second;
    if (tensor.type != GgmlType::f32 || tensor.shape.size() != 1 || tensor.elements() > 4096) {
      throw Error(Fault::bad_file, {"frequency factors are no list of up to 4,096 float32",
                                    path.string() + ", tensor " + kRopeFactors,
                                    "Convert the model again with a current llama.cpp."});
    }
    factors.resize(static_cast<std::size_t>(tensor.elements()));
    dequantise(tensor.type, out.file_.bytes().data() + tensor.offset, tensor.elements(),
               factors.data());
  }
  const std::size_t pairs = factors.size();
  out.config_ = config_from_gguf(values, std::move(factors));
  out.spec_ = model_spec_from_config(out.config_, path.string());
  check_counts(out.spec_, pairs, out.header_, path);
  out.matrices_ = gguf_matrices(out.spec_, false);
  // Files from before llama.cpp split it hold kv_b_proj as it was published.
  for (GgufMatrix& matrix : out.matrices_) {
    if (matrix.matrix.role != MatrixRole::kv_b) continue;
    const std::string& keys = matrix.places.front().tensor;
    const std::string whole = keys.substr(0, keys.find("attn_k_b")) + "attn_kv_b.weight";
    if (out.header_.tensors.find(whole) == out.header_.tensors.end()) continue;
    GgufPlace place;
    place.tensor = whole;
    place.shape = {matrix.matrix.rows, matrix.matrix.columns};
    matrix.places = {place};
  }
  out.check_tensors();
  return out;
}

void GgufModel::check_tensors() const {
  std::vector<std::string> problems;
  std::set<std::string, std::less<>> used = {kRopeFactors};
  for (const GgufMatrix& matrix : matrices_) {
    for (const GgufPlace& place : matrix.places) {
      if (!used.insert(place.tensor).second) continue;
      const auto found = header_.tensors.find(place.tensor);
      if (found == header_.tensors.end()) {
        problems.push_back("tensor " + place.tensor + " is missing");
      } else if (found->second.shape != place.shape) {
        problems.push_back("tensor " + place.tensor + " is " + shape_text(found->second.shape) +
                           ", the file's values ask for " + shape_text(place.shape));
      }
    }
  }
  for (const auto& [name, tensor] : header_.tensors) {
    // Layers behind the last predict further tokens; they are skipped, as everywhere.
    if (used.count(name) != 0 || layer_of(name) >= spec_.layer_count()) continue;
    problems.push_back("tensor " + name + " belongs to no part of a " +
                       std::string(family_name(spec_.family)) + " that Tailor implements");
  }
  if (problems.empty()) return;
  constexpr std::size_t kMost = 12;
  const std::size_t count = problems.size();
  problems.resize(std::min(count, kMost));
  if (count > kMost) problems.push_back("and " + std::to_string(count - kMost) + " more");
  throw Error(
      Fault::bad_file,
      {count == 1 ? problems.front() : std::to_string(count) + " tensors do not fit the model",
       path().string() + (count == 1 ? "" : "\n" + join(problems, "\n")),
       "Use a GGUF file that llama.cpp's own conversion has made, whole."});
}

std::map<std::string, std::string> GgufModel::tokenizer_files() const {
  return tokenizer_files_from_gguf(GgufValues(header_, path().string()), spec_.vocab);
}

const GgufTensor& GgufModel::tensor_of(const GgufPlace& place) const {
  return header_.tensors.find(place.tensor)->second;
}

/// Row `row` of the matrix that begins at the place.
const std::byte* GgufModel::row_of(const GgufPlace& place, std::int64_t row) const {
  const GgufTensor& tensor = tensor_of(place);
  const GgmlLayout& layout = ggml_layout(tensor.type);
  const std::int64_t element = place.first + row * tensor.row();
  return file_.bytes().data() + tensor.offset + element / layout.block * layout.bytes;
}

std::int64_t GgufModel::rows_at_once(const GgufMatrix& matrix) {
  const GgufPlace& place = matrix.places.front();
  if (place.form == GgufForm::latent_keys) return matrix.matrix.rows / place.heads;
  return std::max<std::int64_t>(1, kElementsAtOnce / matrix.matrix.columns);
}

void GgufModel::read_rows(const GgufMatrix& matrix, std::int64_t begin, std::int64_t end,
                          float* out) const {
  const GgufPlace& place = matrix.places.front();
  const std::int64_t columns = matrix.matrix.columns;
  const GgmlType type = tensor_of(place).type;
  if (place.form == GgufForm::plain) {
    // Rows lie one after the other, each of whole blocks.
    return dequantise(type, row_of(place, begin), (end - begin) * columns, out);
  }
  if (place.form == GgufForm::rotary_pairs) {
    const std::int64_t width = matrix.matrix.rows / place.heads;
    for (std::int64_t r = begin; r < end; ++r) {
      // The inverse of unpaired_row.
      const std::int64_t in_head = r % width, half = width / 2;
      const std::int64_t row = r - in_head + in_head % half * 2 + in_head / half;
      dequantise(type, row_of(place, row), columns, out + (r - begin) * columns);
    }
    return;
  }
  const GgufPlace& values = matrix.places.back();
  const std::int64_t nope = spec_.latent.nope_dim, value_dim = spec_.latent.value_dim;
  const std::int64_t width = nope + value_dim, head = begin / width;
  TAILOR_CHECK(begin % width == 0 && end - begin == width, "one head");
  std::vector<float> keys(static_cast<std::size_t>(columns * nope));
  dequantise(type, row_of(place, head * columns), columns * nope, keys.data());
  for (std::int64_t r = 0; r < nope; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      out[r * columns + c] = keys[static_cast<std::size_t>(c * nope + r)];
    }
  }
  dequantise(tensor_of(values).type, row_of(values, head * value_dim), value_dim * columns,
             out + nope * columns);
}

void GgufModel::drop(const GgufMatrix& matrix) const {
  for (const GgufPlace& place : matrix.places) {
    const GgufTensor& tensor = tensor_of(place);
    file_.drop(static_cast<std::size_t>(tensor.offset), static_cast<std::size_t>(tensor.bytes));
  }
}

Dtype GgufModel::unpacked_dtype(const GgufMatrix& matrix) const {
  bool f32 = false, f16 = false, bf16 = false;
  for (const GgufPlace& place : matrix.places) {
    const GgmlType type = tensor_of(place).type;
    (type == GgmlType::f32 ? f32 : type == GgmlType::bf16 ? bf16 : f16) = true;
  }
  if (f32 || (f16 && bf16)) return Dtype::f32;  // holds both
  return bf16 ? Dtype::bf16 : Dtype::f16;
}

}  // namespace tailor
