#include "adapters/merge/receipt.h"

#include <algorithm>
#include <cmath>

#include "adapters/merge/journal.h"
#include "base/error.h"
#include "base/text.h"
#include "data/checkpoint/safetensors.h"

namespace tailor {
namespace {

constexpr std::string_view kFormat = "tailor-merge";

/// Rounded to what a person reads, and to what stays the same on every machine.
double rounded(double value) {
  if (value == 0 || !std::isfinite(value)) return 0;
  const double unit = std::pow(10.0, 5 - std::floor(std::log10(std::fabs(value))));
  return std::round(value * unit) / unit;
}

Json pieces_json(const MergeTensor& tensor) {
  return {tensor.pieces.slice_bytes, tensor.pieces.piece_bytes};
}

Json tensor_json(const MergePlan& plan, const MergeTensor& tensor, const MergedTensor& merged) {
  Json out = {{"name", tensor.name},
              {"file", plan.shards[tensor.file].name},
              {"dtype", dtype_name(tensor.dtype)},
              {"shape", tensor.shape},
              {"pieces", pieces_json(tensor)},
              {"digest", digest_text(merged.out)}};
  if (merged.in && merged.in_digest != merged.out) {
    const MergeTensor& in = plan.inputs[*merged.in];
    out["base"] = {{"name", in.name},
                   {"file", plan.shards[in.file].name},
                   {"pieces", pieces_json(in)},
                   {"digest", digest_text(merged.in_digest)}};
  }
  if (merged.adapted) {
    const MergeShares shares = shares_of(merged.sums);
    out["relative_change"] = rounded(shares.relative_change);
    out["error"] = rounded(shares.error);
    out["kept"] = rounded(shares.kept);
  }
  return out;
}

/// SHA-256 over a line for each tensor, by name.
std::string digest_of_all(const std::map<std::string, std::string>& lines) {
  std::string text;
  for (const auto& [name, line] : lines) text += name + "\t" + line + "\n";
  return sha256_hex(text);
}

std::string line_of(const MergeTensor& tensor, const PieceDigest& digest) {
  const TensorInfo info{tensor.dtype, tensor.shape, 0, 0};
  return std::string(dtype_name(tensor.dtype)) + "\t" + info.shape_text() + "\t" +
         digest_text(digest);
}

}  // namespace

PieceDigest tensor_digest(const std::vector<PieceDigest>& pieces) {
  return piece_digest(std::as_bytes(std::span(pieces)));
}

std::vector<MergedTensor> merged_tensors(const MergePlan& plan,
                                         const std::map<std::size_t, MergedPiece>& done) {
  struct Pieces {
    std::vector<PieceDigest> in, out, in_scales, out_scales;
  };
  std::vector<MergedTensor> out(plan.outputs.size());
  const auto close = [&](const MergePart& part, const Pieces& pieces) {
    MergedTensor& tensor = out[part.out];
    tensor.out = tensor_digest(pieces.out);
    tensor.in = part.in;
    tensor.in_digest = tensor_digest(pieces.in);
    tensor.adapted = !part.terms.empty();
    if (!part.out_scales) return;
    MergedTensor& scales = out[*part.out_scales];
    scales.out = tensor_digest(pieces.out_scales);
    scales.in = part.in_scales;
    scales.in_digest = tensor_digest(pieces.in_scales);
  };
  Pieces pieces;
  for (std::size_t j = 0; j < plan.jobs.size(); ++j) {
    const std::size_t index = plan.jobs[j].part;
    const MergePart& part = plan.parts[index];
    const MergedPiece& piece = done.at(j);
    pieces.in.push_back(piece.in);
    pieces.out.push_back(piece.out);
    pieces.in_scales.push_back(piece.in_scales);
    pieces.out_scales.push_back(piece.out_scales);
    out[part.out].sums.add(piece.sums);
    if (j + 1 < plan.jobs.size() && plan.jobs[j + 1].part == index) continue;
    close(part, pieces);
    pieces = {};
  }
  for (const MergePart& part : plan.parts) {
    if (plan.inputs[part.in].bytes == 0) close(part, {});
  }
  return out;
}

void write_receipt(const fs::path& folder, const MergePlan& plan,
                   const std::vector<MergedTensor>& tensors, const ReceiptFacts& facts,
                   const MergeReport& report, MergeDtype dtype) {
  std::map<std::string, std::string> base_lines, out_lines;
  std::int64_t copied = 0;
  std::map<std::string, std::size_t> by_name;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const MergedTensor& merged = tensors[i];
    by_name[plan.outputs[i].name] = i;
    out_lines[plan.outputs[i].name] = line_of(plan.outputs[i], merged.out);
    if (merged.in) {
      base_lines[plan.inputs[*merged.in].name] = line_of(plan.inputs[*merged.in], merged.in_digest);
    }
    if (merged.in && merged.in_digest == merged.out) ++copied;
  }
  Json base = facts.base;
  base["bytes"] = plan.input_bytes;
  base["fingerprint"] = facts.fingerprint;
  base["digest"] = digest_of_all(base_lines);
  Json files = Json::object();
  for (const auto& [name, digest] : facts.files) files[name] = digest;
  Json head = {
      {"format", kFormat},
      {"version", 1},
      {"tailor", TAILOR_VERSION},
      {"mark", facts.mark},
      {"base", base},
      {"adapters", facts.adapters},
      {"onto", facts.onto},
      {"dtype", dtype == MergeDtype::as_base    ? "as the base's"
                : dtype == MergeDtype::bfloat16 ? "bfloat16"
                                                : "float32"},
      {"output",
       {{"bytes", plan.output_bytes}, {"digest", digest_of_all(out_lines)}, {"files", files}}},
      {"adapted_tensors", report.adapted},
      {"unchanged_tensors", copied},
      {"relative_change", rounded(report.shares.relative_change)},
      {"error", rounded(report.shares.error)},
      {"kept", rounded(report.shares.kept)},
      {"least_kept", {{"tensor", report.least_kept_tensor}, {"kept", rounded(report.least_kept)}}},
      {"run", facts.run},
      {"notes", report.notes}};
  std::string text = head.dump(2);
  text.resize(text.rfind('\n'));  // the object goes on, a line a tensor
  text += ",\n  \"tensors\": [";
  bool first = true;
  for (const auto& [name, index] : by_name) {
    text += first ? "\n    " : ",\n    ";
    text += tensor_json(plan, plan.outputs[index], tensors[index]).dump();
    first = false;
  }
  text += "\n  ]\n}\n";
  write_atomically(folder / kReceiptName, text);
}

std::string receipt_mark(const fs::path& folder) {
  std::error_code error;
  if (!fs::is_regular_file(folder / kReceiptName, error)) return {};
  try {
    const Json json = read_json(folder / kReceiptName);
    const JsonReader reader(json, (folder / kReceiptName).string());
    return reader.text("format", "") == kFormat ? reader.text("mark", "") : std::string();
  } catch (const Error&) {
    return {};
  }
}

}  // namespace tailor
