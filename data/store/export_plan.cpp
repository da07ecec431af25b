#include "data/store/export_plan.h"

#include <algorithm>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "base/units.h"

namespace tailor {
namespace {

/// Of tens of thousands of tensors: an ordered object looks a key up by going through all of them.
using SortedJson = nlohmann::json;

constexpr std::string_view kWeight = ".weight";
constexpr const char* kWayOut =
    "Export it decoded, with --dtype bfloat16, or pack the model again in another format.";

bool quantised(const WeightFormat& format) {
  return format.kind != WeightKind::f32 && format.kind != WeightKind::bf16;
}

bool vocabulary(UnitKind kind) { return kind == UnitKind::embedding || kind == UnitKind::head; }

/// "…q_proj.weight" -> "…q_proj"
Dtype plain_dtype(const WeightFormat& format) {
  return format.kind == WeightKind::f32 ? Dtype::f32 : Dtype::bf16;
}

/// Llama 4's multimodal model, whose config names the language model's own below.
bool is_wrapper(const fs::path& folder) {
  const fs::path path = folder / "config.json";
  const Json config = read_json(path);
  return JsonReader(config, path.string()).text("model_type", "") == "llama4";
}

}  // namespace

ExportPlan::ExportPlan(const Store& store, bool bfloat16, std::int64_t shard_bytes_max,
                       const std::vector<TowerTensor>& towers)
    : store_(store), bfloat16_(bfloat16), wrapper_(is_wrapper(store.folder())) {
  if (wrapper_) prefix_ = "language_model.";
  if (!bfloat16_) refuse_unreadable();
  list_linears();
  experts_fused_ = can_fuse_experts();
  make_tensors();
  if (!towers.empty() && !wrapper_) {
    throw Error(Fault::usage, {"the model is a language model alone, without other towers",
                               store.folder().string(), "Leave --towers-from out."});
  }
  for (const TowerTensor& tower : towers) {
    sets_.push_back(tensors_.size());
    add(tower.name, tower.info.dtype, tower.info.shape);
  }
  make_shards(shard_bytes_max);
  make_notes(!towers.empty());
}

ExportForm ExportPlan::form_of(const StoredUnit& unit, const MatrixPlace& place) const {
  if (!quantised(place.format)) {
    // Experts are chosen by differences of the router's biases: they stay float32.
    const bool kept =
        place.format.kind == WeightKind::bf16 || place.role == MatrixRole::router_bias;
    return bfloat16_ && !kept ? ExportForm::bfloat16 : ExportForm::plain;
  }
  const bool reordered =
      store_.spec().family == Family::llama4 &&
      (place.role == MatrixRole::q || place.role == MatrixRole::k || place.role == MatrixRole::v);
  if (bfloat16_ || reordered || vocabulary(unit.id.kind) || is_vector_role(place.role)) {
    return ExportForm::bfloat16;
  }
  return place.format.kind == WeightKind::int4 ? ExportForm::packed : ExportForm::fp8;
}

void ExportPlan::refuse_unreadable() const {
  for (const StoredUnit& unit : store_.layout().units) {
    for (const MatrixPlace& place : unit.matrices) {
      const WeightFormat& format = place.format;
      std::string why;
      if (format.kind == WeightKind::nf4) {
        why = "is stored as nf4, which compressed-tensors has no layout for";
      } else if (form_of(unit, place) == ExportForm::packed && place.columns % format.group != 0) {
        why = "has " + std::to_string(place.columns) + " inputs, which int4 groups of " +
              std::to_string(format.group) + " do not divide, as compressed-tensors asks for";
      } else if (form_of(unit, place) == ExportForm::fp8 && format != WeightFormat::fp8_blocks() &&
                 format != WeightFormat::fp8_rows()) {
        why = "is stored as " + format_text(format) + ", needed: blocks of 128x128 or rows";
      }
      if (why.empty()) continue;
      throw Error(Fault::usage, {"matrix " + std::string(role_name(place.role)) + " " + why,
                                 store_.where(unit), kWayOut});
    }
  }
}

/// Only all of them: readers look at one name and take the rest to be like it. Under
/// compressed-tensors none of them: transformers then has a linear for every expert's projection.
bool ExportPlan::can_fuse_experts() const {
  const std::string quantization = format();
  if (store_.spec().family != Family::llama4) return false;
  if (!quantization.empty() && quantization != "fp8") return false;
  std::optional<Dtype> dtype;
  for (const StoredUnit& unit : store_.layout().units) {
    if (unit.id.kind != UnitKind::expert) continue;
    for (const MatrixPlace& place : unit.matrices) {
      const ExportForm form = form_of(unit, place);
      if (form != ExportForm::plain && form != ExportForm::bfloat16) return false;
      const Dtype own = form == ExportForm::plain ? plain_dtype(place.format) : Dtype::bf16;
      if (dtype.value_or(own) != own) return false;
      dtype = own;
    }
  }
  return dtype.has_value();
}

void ExportPlan::list_linears() {
  bool head = false;
  for (const StoredUnit& unit : store_.layout().units) {
    if (unit.id.kind == UnitKind::embedding || (unit.id.kind == UnitKind::head && head)) continue;
    head = head || unit.id.kind == UnitKind::head;
    const auto published = unit_matrices(store_.spec(), unit.id, false);
    TAILOR_CHECK(published.size() == unit.matrices.size(), store_.where(unit));
    for (std::size_t i = 0; i < published.size(); ++i) {
      const MatrixPlace& place = unit.matrices[i];
      if (is_vector_role(place.role)) continue;
      const ExportForm form = form_of(unit, place);
      ExportedLinear linear;
      linear.module = prefix_ + module_of(published[i].name);
      linear.format = form == ExportForm::bfloat16 ? WeightFormat::bf16() : place.format;
      if (unit.id.kind == UnitKind::expert) {
        const std::size_t projection = linear.module.rfind('.');
        const std::size_t expert = linear.module.rfind('.', projection - 1);
        linear.experts = linear.module.substr(0, expert);
        linear.projection = linear.module.substr(projection + 1);
      }
      linears_.push_back(std::move(linear));
    }
  }
  // A tied head has no weight of its own and is a module all the same.
  if (!head) linears_.push_back({prefix_ + "lm_head", "", "", WeightFormat::bf16()});
}

void ExportPlan::add(const std::string& name, Dtype dtype, std::vector<std::int64_t> shape) {
  ExportTensor tensor;
  tensor.name = name;
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.bytes = dtype_bytes(dtype);
  for (const std::int64_t size : tensor.shape) tensor.bytes = checked_multiply(tensor.bytes, size);
  TAILOR_CHECK(by_name_.emplace(name, tensors_.size()).second, name);
  tensors_.push_back(std::move(tensor));
}

void ExportPlan::make_tensors() {
  const bool deepseek = format() == "fp8";
  for (const StoredUnit& unit : store_.layout().units) {
    const auto published = unit_matrices(store_.spec(), unit.id, experts_fused_);
    for (std::size_t i = 0; i < published.size(); ++i) {
      const PublishedMatrix& matrix = published[i];
      const MatrixPlace& place = unit.matrices[i];
      const std::string name = prefix_ + matrix.name, module = module_of(name);
      if (by_name_.count(name) > 0) continue;  // a run of the vocabulary, a fused expert
      sets_.push_back(tensors_.size());
      const std::int64_t rows = matrix.rows, columns = matrix.columns;
      const ExportForm form = form_of(unit, place);
      if (form == ExportForm::packed) {
        add(module + ".weight_packed", Dtype::i32, {rows, div_ceil(columns, 8)});
        add(module + ".weight_scale", Dtype::bf16, {rows, columns / place.format.group});
        add(module + ".weight_shape", Dtype::i64, {2});
        continue;
      }
      if (form == ExportForm::fp8) {
        const bool blocks = place.format.block_columns != 0;
        add(name, Dtype::f8_e4m3, {rows, columns});
        add(module + (deepseek ? ".weight_scale_inv" : ".weight_scale"), Dtype::f32,
            {div_ceil(rows, place.format.block_rows),
             blocks ? div_ceil(columns, place.format.block_columns) : 1});
        continue;
      }
      std::vector<std::int64_t> shape = {rows, columns};
      if (matrix.is_vector()) shape = {columns};
      if (matrix.fused) shape = {store_.spec().experts, columns, matrix.width};
      add(name, form == ExportForm::plain ? plain_dtype(place.format) : Dtype::bf16, shape);
    }
  }
}

void ExportPlan::make_shards(std::int64_t shard_bytes_max) {
  // A tensor's line in the header: names, numbers, punctuation.
  constexpr std::int64_t kLineBytes = 160, kFrameBytes = 64;
  std::int64_t filled = 0, count = 0;
  for (std::size_t s = 0; s < sets_.size(); ++s) {
    const std::size_t end = s + 1 < sets_.size() ? sets_[s + 1] : tensors_.size();
    std::int64_t bytes = 0;
    for (std::size_t i = sets_[s]; i < end; ++i) {
      bytes += tensors_[i].bytes + narrow<std::int64_t>(tensors_[i].name.size()) + kLineBytes;
    }
    if (count == 0 || filled + bytes > shard_bytes_max) {
      ++count;
      filled = kFrameBytes;
    }
    filled += bytes;
    for (std::size_t i = sets_[s]; i < end; ++i) {
      tensors_[i].shard = static_cast<std::size_t>(count - 1);
    }
  }
  std::vector<std::vector<std::size_t>> members(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < tensors_.size(); ++i) members[tensors_[i].shard].push_back(i);
  for (std::size_t s = 0; s < members.size(); ++s) {
    // Wide elements first, as safetensors' own writer does: every tensor is aligned to its element.
    std::stable_sort(members[s].begin(), members[s].end(), [&](std::size_t a, std::size_t b) {
      return dtype_bytes(tensors_[a].dtype) > dtype_bytes(tensors_[b].dtype);
    });
    SortedJson header;
    header["__metadata__"] = {{"format", "pt"}};
    std::int64_t at = 0;
    for (const std::size_t i : members[s]) {
      ExportTensor& tensor = tensors_[i];
      header[tensor.name] = {{"dtype", dtype_name(tensor.dtype)},
                             {"shape", tensor.shape},
                             {"data_offsets", {at, at + tensor.bytes}}};
      tensor.offset = at;
      at += tensor.bytes;
    }
    ExportShard shard;
    shard.name = shard_name(s, members.size());
    shard.header = safetensors_head(header.dump());
    for (const std::size_t i : members[s]) {
      tensors_[i].offset += narrow<std::int64_t>(shard.header.size());
    }
    shard.bytes = narrow<std::int64_t>(shard.header.size()) + at;
    shards_.push_back(std::move(shard));
  }
}

void ExportPlan::make_notes(bool with_towers) {
  std::set<std::string> decoded;
  std::map<std::string, std::set<std::string>> of_experts;
  for (const StoredUnit& unit : store_.layout().units) {
    for (const MatrixPlace& place : unit.matrices) {
      if (!bfloat16_ && quantised(place.format) && form_of(unit, place) == ExportForm::bfloat16) {
        decoded.insert(role_name(place.role));
      }
    }
  }
  for (const ExportedLinear& linear : linears_) {
    if (!linear.experts.empty()) of_experts[linear.experts].insert(format_text(linear.format));
  }
  if (!decoded.empty()) {
    const std::vector<std::string> names(decoded.begin(), decoded.end());
    notes_.push_back("Quantised in the store and written as bfloat16: " + join(names, ", ") +
                     ". Not every vLLM release reads these packed.");
  }
  const bool differ = std::any_of(of_experts.begin(), of_experts.end(),
                                  [](const auto& entry) { return entry.second.size() > 1; });
  if (differ) {
    notes_.emplace_back(
        "The experts of a layer are in more than one format, which vLLM refuses: pack the model "
        "with a --group that divides both widths.");
  }
  if (wrapper_ && !with_towers) {
    notes_.emplace_back(
        "A store holds the language model alone: add the vision tower and the projector with "
        "--towers-from MODEL.");
  }
}

std::int64_t ExportPlan::bytes() const {
  std::int64_t total = 0;
  for (const ExportTensor& tensor : tensors_) total += tensor.bytes;
  return total;
}

std::vector<ExportMatrix> ExportPlan::matrices(const StoredUnit& unit) const {
  std::vector<ExportMatrix> out;
  const auto published = unit_matrices(store_.spec(), unit.id, experts_fused_);
  for (std::size_t i = 0; i < published.size(); ++i) {
    ExportMatrix matrix{form_of(unit, unit.matrices[i]), published[i]};
    const std::string name = prefix_ + published[i].name;
    matrix.tensor =
        by_name_.at(matrix.form == ExportForm::packed ? module_of(name) + ".weight_packed" : name);
    if (vocabulary(unit.id.kind)) matrix.first_row = unit.id.index;
    out.push_back(std::move(matrix));
  }
  return out;
}

std::string ExportPlan::index_text() const {
  SortedJson out;
  out["metadata"]["total_size"] = bytes();
  SortedJson& map = out["weight_map"];
  for (const ExportTensor& tensor : tensors_) map[tensor.name] = shards_[tensor.shard].name;
  return out.dump(2) + "\n";
}

Json ExportPlan::config(Json config) const {
  std::vector<Json*> parts = {&config};
  if (config.contains("text_config")) parts.push_back(&config["text_config"]);
  bool named = false;
  for (Json* part : parts) {
    part->erase("quantization_config");
    part->erase("compression_config");
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (!bfloat16_ || !part->contains(key)) continue;
      (*part)[key] = "bfloat16";
      named = true;
    }
  }
  if (bfloat16_ && !named) config["torch_dtype"] = "bfloat16";
  Json quantization = quantization_config(linears_, wrapper_);
  if (!quantization.is_null()) config["quantization_config"] = std::move(quantization);
  return config;
}

}  // namespace tailor
