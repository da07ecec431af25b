#include "recipes/measured_step.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "recipes/plan_text.h"

namespace tailor {

double MeasuredStep::forward_seconds() const {
  double sum = 0;
  for (const Layers& kind : layers) sum += as_double(kind.in_model) * kind.forward_seconds;
  return sum;
}
double MeasuredStep::backward_seconds() const {
  double sum = 0;
  for (const Layers& kind : layers) sum += as_double(kind.in_model) * kind.backward_seconds;
  return sum;
}
double MeasuredStep::kernels_after(double steps) const {
  if (row_counts.empty()) return 0;
  // Between two entries as many a step; behind the last, which is of thousands of steps, no more.
  const double place = std::log2(std::max(1.0, steps));
  const auto before = std::min(static_cast<std::size_t>(place), row_counts.size() - 1);
  const auto after = std::min(before + 1, row_counts.size() - 1);
  const double low = std::exp2(static_cast<double>(before));
  const double part = after == before ? 0 : (steps - low) / low;
  const double counts =
      as_double(row_counts[before]) +
      std::clamp(part, 0.0, 1.0) * as_double(row_counts[after] - row_counts[before]);
  constexpr double kMetBefore = 2;  // in the steps before process_bytes was read
  return kernel_bytes * (std::max(0.0, counts - kMetBefore) + as_double(evaluation_row_counts) / 2);
}
std::int64_t MeasuredStep::measured_layers() const {
  std::int64_t sum = 0;
  for (const Layers& kind : layers) sum += kind.measured;
  return sum;
}
std::int64_t MeasuredStep::model_layers() const {
  std::int64_t sum = 0;
  for (const Layers& kind : layers) sum += kind.in_model;
  return sum;
}

std::string MeasuredStep::source() const {
  return std::to_string(measured_layers()) + " of " + std::to_string(model_layers()) +
         " layers measured on this machine on " + date + ", " + whole(tokens) + " tokens a step";
}

Json to_json(const MeasuredStep& step) {
  Json layers = Json::array();
  for (const MeasuredStep::Layers& kind : step.layers) {
    layers.push_back({{"kind", kind.kind},
                      {"measured", kind.measured},
                      {"in_model", kind.in_model},
                      {"forward_seconds", kind.forward_seconds},
                      {"backward_seconds", kind.backward_seconds}});
  }
  Json stream;
  if (step.stream) {
    stream = {{"passes_seconds", step.stream->passes_seconds},
              {"longer_seconds", step.stream->longer_seconds}};
  }
  return {{"measured", step.date},
          {"threads", step.threads},
          {"busy_share", step.busy_share},
          {"tokens", step.tokens},
          {"trained_tokens", step.trained_tokens},
          {"layer_flops_per_token", step.layer_flops_per_token},
          {"parameters", step.parameters},
          {"dequantising", step.dequantising},
          {"layers", std::move(layers)},
          {"head_seconds", step.head_seconds},
          {"update_seconds", step.update_seconds},
          {"disk_bytes_per_second", step.disk_bytes_per_second},
          {"stream", std::move(stream)},
          {"pass_bytes", step.pass_bytes},
          {"tokens_max", step.tokens_max},
          {"kept", step.kept},
          {"in_memory", step.in_memory},
          {"process_bytes", step.process_bytes},
          {"kernel_bytes", step.kernel_bytes},
          {"row_counts", step.row_counts},
          {"evaluation_row_counts", step.evaluation_row_counts}};
}

MeasuredStep read_measured_step(const Json& json, const std::string& where) {
  const JsonReader reader(json, where);
  MeasuredStep out;
  const auto above_zero = [&](const JsonReader& from, const char* key) {
    const double value = from.number(key);
    if (value > 0 && std::isfinite(value)) return value;
    throw Error(Fault::bad_file, {std::string(key) + " is not above zero", where,
                                  "Remove the file; the next measurement writes it anew."});
  };
  out.date = reader.text("measured");
  out.threads = static_cast<int>(reader.integer("threads"));
  out.busy_share = reader.number("busy_share");
  out.tokens = above_zero(reader, "tokens");
  out.trained_tokens = above_zero(reader, "trained_tokens");
  out.layer_flops_per_token = above_zero(reader, "layer_flops_per_token");
  out.parameters = above_zero(reader, "parameters");
  out.dequantising = reader.boolean("dequantising", false);
  for (const Json& entry : reader.at("layers")) {
    const JsonReader kind(entry, where);
    out.layers.push_back({kind.text("kind"), kind.integer("measured"), kind.integer("in_model"),
                          above_zero(kind, "forward_seconds"),
                          above_zero(kind, "backward_seconds")});
  }
  out.head_seconds = above_zero(reader, "head_seconds");
  out.update_seconds = above_zero(reader, "update_seconds");
  out.disk_bytes_per_second = above_zero(reader, "disk_bytes_per_second");
  if (reader.has("stream")) {
    const JsonReader stream(reader.at("stream"), where);
    out.stream = MeasuredStep::Stream{above_zero(stream, "passes_seconds"),
                                      above_zero(stream, "longer_seconds")};
  }
  out.pass_bytes = above_zero(reader, "pass_bytes");
  out.tokens_max = above_zero(reader, "tokens_max");
  out.kept = reader.boolean("kept", true);
  out.in_memory = reader.boolean("in_memory", true);
  out.process_bytes = above_zero(reader, "process_bytes");
  out.kernel_bytes = std::max(0.0, reader.number("kernel_bytes"));
  for (const Json& count : reader.at("row_counts")) {
    if (!count.is_number_integer()) {
      throw Error(Fault::bad_file, {"row_counts holds something else than whole numbers", where,
                                    "Remove the file; the next measurement writes it anew."});
    }
    out.row_counts.push_back(count.get<std::int64_t>());
  }
  out.evaluation_row_counts = reader.integer("evaluation_row_counts");
  return out;
}

}  // namespace tailor
