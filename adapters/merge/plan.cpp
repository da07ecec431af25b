#include "adapters/merge/plan.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/units.h"
#include "data/checkpoint/safetensors.h"
#include "data/store/source_form.h"

namespace tailor {
namespace {

constexpr std::int64_t kPieceBytes = std::int64_t{4} << 20;
constexpr std::int64_t kBlock = 128;
constexpr std::string_view kRouterBias = "e_score_correction_bias";

bool is_number(Dtype dtype) {
  return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16;
}

/// What the adapters do to one tensor, by its published name in the text model.
struct Use {
  PublishedMatrix matrix;  ///< of a fused tensor: its first expert's first matrix
  std::int64_t experts = 1;
  std::int64_t layer = -1, expert = 0;
  std::int64_t first_output = 0;
  int order = 0;
  std::vector<MergeTerm> terms;
};

class Planner {
 public:
  Planner(const Checkpoint& base, const ModelSpec& spec,
          const std::vector<AdapterToMerge>& adapters, MergeDtype dtype)
      : base_(base), spec_(spec), adapters_(adapters), dtype_(dtype) {}

  MergePlan go() {
    fused_ = experts_are_fused(spec_, [&](const std::string& name) { return base_.has(name); });
    list_uses();
    list_inputs();
    for (std::size_t i = 0; i < plan_.inputs.size(); ++i) {
      if (part_of_[i] == kUnseen) add_part(i);
    }
    check_adapted();
    lay_out();
    make_jobs();
    return std::move(plan_);
  }

 private:
  static constexpr int kUnseen = -1, kCompanion = -2;

  // ------------------------------------------------------------------ what is adapted
  void list_uses() {
    for (std::int64_t l = 0; l < spec_.layer_count(); ++l) {
      int order = 0;
      for (const auto& matrices : {attention_matrices(spec_, l), feed_forward_matrices(spec_, l)}) {
        for (const PublishedMatrix& matrix : matrices) {
          if (!matrix.is_vector()) uses_[matrix.name] = {matrix, 1, l, 0, 0, order++, {}};
        }
      }
      if (!spec_.layers[static_cast<std::size_t>(l)].moe) continue;
      const std::int64_t counted = fused_ ? 1 : spec_.experts;
      for (std::int64_t e = 0; e < counted; ++e) {
        const auto expert = expert_matrices(spec_, l, e, fused_);  // gate, up, down
        uses_[expert[0].name] = {expert[0], spec_.experts, l, e, 0, 1000, {}};
        if (!fused_) {
          uses_[expert[1].name] = {expert[1], 1, l, e, spec_.expert_width, 1000, {}};
          uses_[expert[0].name].experts = 1;
        }
        uses_[expert[2].name] = {expert[2], fused_ ? spec_.experts : 1, l, e, 0, 1001, {}};
      }
    }
    for (const auto& matrix : {embedding_matrix(spec_), head_matrix(spec_)}) {
      uses_[matrix.name] = {matrix, 1, -1, 0, 0, 0, {}};
    }
    for (std::size_t a = 0; a < adapters_.size(); ++a) {
      const auto sites = adapters_[a].reader->sites();
      for (std::size_t s = 0; s < sites.size(); ++s) {
        const MergeTerm term{a, s, sites[s].scale * adapters_[a].weight};
        for (const std::string& name : tensors_of(sites[s])) {
          const auto found = uses_.find(name);
          TAILOR_CHECK(found != uses_.end(), name);
          found->second.terms.push_back(term);
        }
      }
    }
  }

  std::vector<std::string> tensors_of(const LoraSite& site) const {
    if (!site.is_experts()) return {site.module + ".weight"};
    const bool down = site.projection == Projection::experts_down;
    std::vector<std::string> out;
    for (std::int64_t e = 0; e < (fused_ ? 1 : site.experts); ++e) {
      const auto matrices = expert_matrices(spec_, site.layer, e, fused_);
      if (down) {
        out.push_back(matrices[2].name);
      } else {
        out.push_back(matrices[0].name);
        if (!fused_) out.push_back(matrices[1].name);
      }
    }
    return out;
  }

  // ------------------------------------------------------------------ the base's tensors
  void list_inputs() {
    std::map<std::string, fs::path> shards;
    for (const auto& [name, path] : base_.shards()) shards[name] = path;
    for (const auto& [name, path] : shards) {
      const MappedFile file(path);
      const SafetensorsHeader header = parse_safetensors_header(file.bytes(), path);
      const std::size_t shard = plan_.shards.size();
      plan_.shards.push_back({name, path, "", 0});
      metadata_.push_back(header.metadata);
      std::uint64_t length = 0;
      std::memcpy(&length, file.bytes().data(), sizeof length);
      headers_.emplace_back(file.text().substr(0, sizeof length + length));
      const std::size_t before = plan_.inputs.size();
      for (const auto& [tensor, info] : header.tensors) {
        plan_.inputs.push_back(
            {tensor, info.dtype, info.shape, info.bytes, shard, info.offset, {}});
        plan_.input_bytes += info.bytes;
      }
      std::sort(plan_.inputs.begin() + static_cast<std::ptrdiff_t>(before), plan_.inputs.end(),
                [](const MergeTensor& x, const MergeTensor& y) { return x.offset < y.offset; });
    }
    for (std::size_t i = 0; i < plan_.inputs.size(); ++i) by_name_[plan_.inputs[i].name] = i;
    part_of_.assign(plan_.inputs.size(), kUnseen);
    output_of_.assign(plan_.inputs.size(), std::nullopt);
    plan_.had_index = base_.has_index();
  }

  /// The tensor's name in the text model; nothing for another tower's.
  std::optional<std::string> text_name(const std::string& stored) const {
    const std::string& prefix = base_.prefix();
    if (!stored.starts_with(prefix)) return std::nullopt;
    return stored.substr(prefix.size());
  }

  std::size_t input(const Checkpoint::Tensor& tensor) const {
    return by_name_.at(tensor.stored_name);
  }

  /// The output that stands where an input stood.
  std::size_t add_output(std::size_t in, const std::string& name, Dtype dtype,
                         std::vector<std::int64_t> shape) {
    MergeTensor out{name, dtype, std::move(shape), 0, plan_.inputs[in].file, 0, {}};
    out.bytes = dtype_bytes(dtype);
    for (const std::int64_t size : out.shape) out.bytes = checked_multiply(out.bytes, size);
    output_of_[in] = plan_.outputs.size();
    plan_.outputs.push_back(std::move(out));
    return plan_.outputs.size() - 1;
  }

  Dtype wanted_dtype(const std::string& text, Dtype stored) const {
    if (dtype_ == MergeDtype::as_base || text.ends_with(kRouterBias)) return stored;
    return dtype_ == MergeDtype::bfloat16 ? Dtype::bf16 : Dtype::f32;
  }

  void add_part(std::size_t in) {
    const MergeTensor& tensor = plan_.inputs[in];
    const auto text = text_name(tensor.name);
    if (!text) return add_copy(in);
    if (*text == module_name(*text) + ".weight_packed") return add_int4(in, *text);
    if (is_companion(*text)) return;  // goes with its codes
    const auto use = uses_.find(*text);
    if (tensor.dtype == Dtype::f8_e4m3) return add_fp8(in, *text);
    const bool adapted = use != uses_.end() && !use->second.terms.empty();
    if (!is_number(tensor.dtype)) {
      if (adapted) refuse_type(tensor);
      return add_copy(in);
    }
    const Dtype wanted = wanted_dtype(*text, tensor.dtype);
    if (!adapted && wanted == tensor.dtype) return add_copy(in);
    MergePart part;
    part.kind = MergePart::Kind::plain;
    set_place(part, in, use == uses_.end() ? nullptr : &use->second);
    part.out = add_output(in, tensor.name, wanted, tensor.shape);
    finish_part(part, in, dtype_bytes(tensor.dtype));
  }

  [[noreturn]] void refuse_type(const MergeTensor& tensor) const {
    throw Error(
        Fault::bad_file,
        {"weights of type " + std::string(dtype_name(tensor.dtype)) + " cannot be merged into",
         plan_.shards[tensor.file].source.string() + ", tensor " + tensor.name,
         "Use a base in F32, F16, BF16, fp8 (F8_E4M3 with scales) or INT4 "
         "(compressed-tensors, pack-quantized)."});
  }

  static std::string module_name(const std::string& text) {
    const std::size_t dot = text.rfind('.');
    return dot == std::string::npos ? text : text.substr(0, dot);
  }

  /// Scales and shapes of quantised weights: they are a part of their codes' part.
  bool is_companion(const std::string& text) const {
    for (const char* suffix : {".weight_scale", ".weight_shape"}) {
      if (text.ends_with(suffix) && base_.has(module_name(text) + ".weight_packed")) return true;
    }
    for (const std::string_view suffix : {"_scale_inv", "_scale"}) {
      if (!text.ends_with(suffix)) continue;
      const std::string codes = text.substr(0, text.size() - suffix.size());
      if (base_.has(codes)) return base_.find(codes).info.dtype == Dtype::f8_e4m3;
    }
    return false;
  }

  void add_copy(std::size_t in) {
    const MergeTensor tensor = plan_.inputs[in];
    MergePart part;
    part.in = in;
    part.out = add_output(in, tensor.name, tensor.dtype, tensor.shape);
    part_of_[in] = static_cast<int>(plan_.parts.size());
    const TensorPieces pieces{tensor.bytes, 2 * kPieceBytes};
    plan_.inputs[in].pieces = plan_.outputs[part.out].pieces = pieces;
    plan_.parts.push_back(std::move(part));
  }

  /// Rows, columns and slices of a tensor of numbers or of fp8 codes, and what is added to them.
  void set_place(MergePart& part, std::size_t in, const Use* use) const {
    const MergeTensor& tensor = plan_.inputs[in];
    part.in = in;
    const auto& shape = tensor.shape;
    part.columns = shape.empty() ? 1 : shape.back();
    const bool stacked = shape.size() == 3;
    part.slices = stacked ? shape[0] : 1;
    part.slice_rows = 1;
    for (std::size_t i = stacked ? 1 : 0; i + 1 < shape.size(); ++i) part.slice_rows *= shape[i];
    if (use == nullptr) return;
    if (!use->matrix.is_vector() && shape != use->matrix.tensor_shape(use->experts)) {
      // Names the tensor and both shapes.
      static_cast<void>(base_.find(use->matrix.name, use->matrix.tensor_shape(use->experts)));
    }
    part.terms = use->terms;
    part.layer = use->layer;
    part.order = use->order;
    part.expert = use->expert;
    part.first_output = use->first_output;
    part.inputs_first = use->matrix.fused && !use->matrix.outputs_first;
  }

  void finish_part(MergePart& part, std::size_t in, std::int64_t number_bytes,
                   std::int64_t step = 1) {
    const std::int64_t row_bytes = std::max<std::int64_t>(1, part.columns * number_bytes);
    const std::int64_t rows = std::max<std::int64_t>(1, kPieceBytes / row_bytes / step) * step;
    part.piece_rows = std::min(rows, std::max<std::int64_t>(1, part.slice_rows));
    if (!part.terms.empty()) ++plan_.adapted_tensors;
    part_of_[in] = static_cast<int>(plan_.parts.size());
    const auto cut = [&](MergeTensor& tensor) {
      const std::int64_t slice = tensor.bytes / std::max<std::int64_t>(1, part.slices);
      tensor.pieces = {slice, slice / std::max<std::int64_t>(1, part.slice_rows) * part.piece_rows};
      if (tensor.pieces.piece_bytes == 0)
        tensor.pieces.piece_bytes = std::max<std::int64_t>(1, slice);
    };
    cut(plan_.inputs[in]);
    cut(plan_.outputs[part.out]);
    plan_.parts.push_back(part);
  }

  /// Scales of a part are cut as its codes are: a piece has the scales of its own rows.
  void cut_scales(const MergePart& part, MergeTensor& scales) const {
    const std::int64_t slice = scales.bytes / part.slices;
    if (part.scales_by_column()) {
      scales.pieces = {slice, slice};
      return;
    }
    const std::int64_t block = part.kind == MergePart::Kind::fp8 ? part.format.block_rows : 1;
    const std::int64_t scale_rows = div_ceil(part.slice_rows, block);
    scales.pieces = {slice, slice / scale_rows * div_ceil(part.piece_rows, block)};
  }

  bool unquantised() const { return dtype_ != MergeDtype::as_base; }
  Dtype decoded_dtype() const { return dtype_ == MergeDtype::float32 ? Dtype::f32 : Dtype::bf16; }

  // ------------------------------------------------------------------ quantised weights
  /// A matrix of the text model, or of one of its prediction layers: whatever has two sides.
  PublishedMatrix matrix_like(const std::string& text, std::int64_t rows,
                              std::int64_t columns) const {
    const auto use = uses_.find(text);
    if (use != uses_.end()) return use->second.matrix;
    return {MatrixRole::gate, rows, columns, text};
  }

  [[noreturn]] void refuse_scales(const Checkpoint::Tensor& scales) const {
    throw Error(
        Fault::bad_file,
        {"INT4 with scales of type " + std::string(dtype_name(scales.info.dtype)) +
             " is read, but not written again",
         base_.where(scales), "Add --dtype bfloat16: the merged weights are then not quantised."});
  }

  void take_companion(const Checkpoint::Tensor& tensor) { part_of_[input(tensor)] = kCompanion; }
  /// Scales that stay as they are.
  void copy_companion(const std::string& text) {
    if (!base_.has(text)) return;
    add_copy(input(base_.find(text)));
  }

  void add_fp8(std::size_t in, const std::string& text) {
    const MergeTensor tensor = plan_.inputs[in];
    const auto use = uses_.find(text);
    const bool adapted = use != uses_.end() && !use->second.terms.empty();
    if (!adapted && !unquantised()) {
      add_copy(in);
      for (const std::string& name : scale_names(text)) copy_companion(name);
      return;
    }
    if (tensor.shape.size() < 2) refuse_type(tensor);
    MergePart part;
    part.kind = MergePart::Kind::fp8;
    set_place(part, in, use == uses_.end() ? nullptr : &use->second);
    const SourceMatrix source =
        find_source(base_, matrix_like(text, tensor.shape[0], tensor.shape[1]));
    part.format = source.format;
    part.requantised = !unquantised();
    if (part.format.block_columns == 0) part.format.block_columns = part.columns;
    if (tensor.shape.size() == 3 && source.scale_count > 0) {
      // Gate and up are slices of their own: no block of scales lies in both.
      part.slices_a_expert = part.slice_rows / matrix_like(text, 0, 0).rows;
      part.slice_rows /= part.slices_a_expert;
      part.slices *= part.slices_a_expert;
    }
    part.in_scales = input(*source.scales);
    take_companion(*source.scales);
    const MergeTensor scales = plan_.inputs[*part.in_scales];
    part.out = add_output(in, tensor.name, part.requantised ? tensor.dtype : decoded_dtype(),
                          tensor.shape);
    const bool whole = part.requantised && part.scales_by_column();
    finish_part(part, in, 1, whole ? part.slice_rows : part.format.block_rows);
    MergePart& added = plan_.parts.back();
    cut_scales(added, plan_.inputs[*added.in_scales]);
    if (added.requantised) {
      added.out_scales = add_output(*added.in_scales, scales.name, scales.dtype, scales.shape);
      plan_.outputs[*added.out_scales].pieces = plan_.inputs[*added.in_scales].pieces;
    }
  }

  void add_int4(std::size_t in, const std::string& text) {
    const std::string module = module_name(text), weight = module + ".weight";
    const auto use = uses_.find(weight);
    const bool adapted = use != uses_.end() && !use->second.terms.empty();
    const std::string shape_name = module + ".weight_shape";
    if (!adapted && !unquantised()) {
      add_copy(in);
      copy_companion(module + ".weight_scale");
      copy_companion(shape_name);
      return;
    }
    const MergeTensor tensor = plan_.inputs[in];
    if (tensor.shape.size() != 2) refuse_type(tensor);
    PublishedMatrix matrix = matrix_like(weight, tensor.shape[0], tensor.shape[1] * 8);
    if (use == uses_.end() && base_.has(shape_name)) {
      const auto bytes = base_.bytes(base_.find(shape_name));
      std::int64_t sides[2] = {0, 0};
      if (bytes.size() == sizeof sides) std::memcpy(sides, bytes.data(), sizeof sides);
      if (sides[1] > 0) matrix.columns = sides[1];
    }
    const SourceMatrix source = find_source(base_, matrix);
    MergePart part;
    part.kind = MergePart::Kind::int4;
    part.in = in;
    part.format = source.format;
    part.requantised = !unquantised();
    part.slice_rows = matrix.rows;
    part.columns = matrix.columns;
    if (use != uses_.end()) {
      part.terms = use->second.terms;
      part.layer = use->second.layer;
      part.order = use->second.order;
      part.expert = use->second.expert;
      part.first_output = use->second.first_output;
    }
    part.in_scales = input(*source.scales);
    take_companion(*source.scales);
    const MergeTensor scales = plan_.inputs[*part.in_scales];
    if (part.requantised && scales.dtype != Dtype::bf16) {
      refuse_scales(*source.scales);
    }
    if (part.requantised) {
      part.out = add_output(in, tensor.name, tensor.dtype, tensor.shape);
      copy_companion(shape_name);
    } else {
      if (base_.has(shape_name)) take_companion(base_.find(shape_name));
      part.out =
          add_output(in, base_.prefix() + weight, decoded_dtype(), {matrix.rows, matrix.columns});
    }
    const std::int64_t columns = part.columns;
    part.columns = div_ceil(columns, 8) * 4;  // bytes a row, to cut it
    finish_part(part, in, 1);
    MergePart& added = plan_.parts.back();
    added.columns = columns;
    cut_scales(added, plan_.inputs[*added.in_scales]);
    if (added.requantised) {
      added.out_scales = add_output(*added.in_scales, scales.name, scales.dtype, scales.shape);
      plan_.outputs[*added.out_scales].pieces = plan_.inputs[*added.in_scales].pieces;
    }
  }

  // ------------------------------------------------------------------ the merged files
  /// Every matrix that an adapter changes must be among the parts.
  void check_adapted() const {
    std::set<std::string> seen;
    for (const MergePart& part : plan_.parts) {
      if (part.terms.empty()) continue;
      std::string text = *text_name(plan_.inputs[part.in].name);
      if (part.kind == MergePart::Kind::int4) text = module_name(text) + ".weight";
      seen.insert(text);
    }
    for (const auto& [name, use] : uses_) {
      if (!use.terms.empty() && seen.count(name) == 0) static_cast<void>(base_.find(name));
    }
  }

  void lay_out() {
    std::vector<Json> headers(plan_.shards.size(), Json::object());
    std::vector<std::int64_t> ends(plan_.shards.size(), 0);
    std::vector<bool> same(plan_.shards.size(), true);
    for (std::size_t s = 0; s < plan_.shards.size(); ++s) {
      if (!metadata_[s].empty()) headers[s]["__metadata__"] = metadata_[s];
    }
    for (std::size_t i = 0; i < plan_.inputs.size(); ++i) {
      const MergeTensor& in = plan_.inputs[i];
      if (!output_of_[i]) {
        same[in.file] = false;
        continue;
      }
      MergeTensor& out = plan_.outputs[*output_of_[i]];
      same[in.file] =
          same[in.file] && out.name == in.name && out.dtype == in.dtype && out.shape == in.shape;
      out.offset = ends[in.file];
      ends[in.file] += out.bytes;
      headers[in.file][out.name] = {{"dtype", dtype_name(out.dtype)},
                                    {"shape", out.shape},
                                    {"data_offsets", {out.offset, ends[in.file]}}};
      plan_.output_bytes += out.bytes;
    }
    for (std::size_t s = 0; s < plan_.shards.size(); ++s) {
      MergeShard& shard = plan_.shards[s];
      // Where nothing changes it is the base's to the byte.
      shard.header = same[s] ? headers_[s] : safetensors_head(headers[s].dump());
      shard.bytes = static_cast<std::int64_t>(shard.header.size()) + ends[s];
    }
    for (MergeTensor& out : plan_.outputs) {
      out.offset += static_cast<std::int64_t>(plan_.shards[out.file].header.size());
    }
    plan_.config_changes = unquantised();
  }

  void make_jobs() {
    std::vector<std::size_t> order(plan_.parts.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    // Shard by shard; within one the parts of a site together, since they share its factors.
    const auto key = [&](std::size_t i) {
      const MergePart& part = plan_.parts[i];
      return std::tuple(plan_.inputs[part.in].file, part.terms.empty() ? -1 : part.layer,
                        part.terms.empty() ? 0 : part.order, part.expert,
                        plan_.inputs[part.in].offset);
    };
    std::sort(order.begin(), order.end(),
              [&](std::size_t x, std::size_t y) { return key(x) < key(y); });
    for (const std::size_t i : order) {
      const MergePart& part = plan_.parts[i];
      const MergeTensor& in = plan_.inputs[part.in];
      if (in.bytes == 0) continue;
      const std::int64_t pieces = part.kind == MergePart::Kind::copy
                                      ? div_ceil(in.bytes, in.pieces.piece_bytes)
                                      : div_ceil(part.slice_rows, part.piece_rows);
      for (std::int64_t slice = 0; slice < part.slices; ++slice) {
        for (std::int64_t piece = 0; piece < pieces; ++piece) {
          plan_.jobs.push_back({i, slice, piece});
        }
      }
    }
  }

  const Checkpoint& base_;
  const ModelSpec& spec_;
  const std::vector<AdapterToMerge>& adapters_;
  MergeDtype dtype_;
  bool fused_ = false;
  std::map<std::string, Use> uses_;
  std::vector<std::map<std::string, std::string>> metadata_;
  std::vector<std::string> headers_;
  std::map<std::string, std::size_t> by_name_;
  std::vector<int> part_of_;
  std::vector<std::optional<std::size_t>> output_of_;
  MergePlan plan_;
};

}  // namespace

std::int64_t TensorPieces::pieces_of(std::int64_t tensor_bytes) const {
  if (tensor_bytes == 0) return 0;
  return tensor_bytes / slice_bytes * div_ceil(slice_bytes, piece_bytes);
}

std::pair<std::int64_t, std::int64_t> MergePlan::rows_of(const MergeJob& job) const {
  const MergePart& part = parts[job.part];
  const std::int64_t first = job.piece * part.piece_rows;
  return {first, std::min(part.piece_rows, part.slice_rows - first)};
}

MergePlan plan_merge(const Checkpoint& base, const ModelSpec& spec,
                     const std::vector<AdapterToMerge>& adapters, MergeDtype dtype) {
  return Planner(base, spec, adapters, dtype).go();
}

Json merged_config(Json config, MergeDtype dtype) {
  if (dtype == MergeDtype::as_base) return config;
  const char* name = dtype == MergeDtype::bfloat16 ? "bfloat16" : "float32";
  const auto set = [&](Json& of) {
    of.erase("quantization_config");
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (of.contains(key)) of[key] = name;
    }
  };
  const bool known = config.contains("dtype") || config.contains("torch_dtype");
  set(config);
  if (!known) config["torch_dtype"] = name;
  if (config.contains("text_config") && config["text_config"].is_object()) {
    set(config["text_config"]);
  }
  return config;
}

std::string merged_index(const MergePlan& plan) {
  std::map<std::string, std::string> map;
  for (const MergeTensor& tensor : plan.outputs) map[tensor.name] = plan.shards[tensor.file].name;
  Json weight_map = Json::object();
  for (const auto& [tensor, shard] : map) weight_map[tensor] = shard;
  return Json{{"metadata", {{"total_size", plan.output_bytes}}}, {"weight_map", weight_map}}.dump(
             2) +
         "\n";
}

}  // namespace tailor
