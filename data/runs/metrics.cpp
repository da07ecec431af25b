#include "data/runs/metrics.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/json.h"

namespace tailor {
namespace {

/// Builds {"key": value, ...} in the order of calls; floats with 9 significant digits.
class Line {
 public:
  Line& add(std::string_view key, std::int64_t value) { return raw(key, std::to_string(value)); }
  Line& add(std::string_view key, double value) {
    if (!std::isfinite(value)) return raw(key, "null");
    std::array<char, 32> buffer{};
    std::snprintf(buffer.data(), buffer.size(), "%.9g", value);
    return raw(key, buffer.data());
  }
  Line& add(std::string_view key, const std::optional<double>& value) {
    return value.has_value() ? add(key, *value) : raw(key, "null");
  }
  std::string text() const { return text_ + "}"; }

 private:
  Line& raw(std::string_view key, std::string_view value) {
    text_ += text_.empty() ? "{\"" : ", \"";
    text_ += key;
    text_ += "\": ";
    text_ += value;
    return *this;
  }
  std::string text_;
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::optional<double> number_or_null(const JsonReader& reader, std::string_view key) {
  if (!reader.has(key)) return std::nullopt;
  return reader.number(key);
}

std::optional<StepMetrics::Exchange> exchange_from(const JsonReader& reader) {
  if (!reader.has("exchange_bytes")) return std::nullopt;
  return StepMetrics::Exchange{.weight_bytes = reader.integer("exchange_weight_bytes", 0),
                               .factor_bytes = reader.integer("exchange_factor_bytes", 0),
                               .gradient_bytes = reader.integer("exchange_gradient_bytes", 0),
                               .seconds = reader.number("exchange_seconds", kNan),
                               .exposed_seconds = reader.number("exchange_exposed_seconds", kNan)};
}

StepMetrics step_from(const JsonReader& reader) {
  return {.step = reader.integer("step"),
          .loss = reader.number("loss", kNan),
          .learning_rate = reader.number("learning_rate", kNan),
          .grad_norm = reader.number("grad_norm", kNan),
          .tokens = reader.integer("tokens", 0),
          .trained_tokens = reader.integer("trained_tokens", 0),
          .seconds = reader.number("seconds", kNan),
          .tokens_per_second = reader.number("tokens_per_second", kNan),
          .stream_bytes = reader.integer("stream_bytes", 0),
          .stall_seconds = reader.number("stall_seconds", 0),
          .exchange = exchange_from(reader),
          .host_bytes_peak = reader.has("host_bytes_peak")
                                 ? std::optional(reader.integer("host_bytes_peak"))
                                 : std::nullopt,
          .gpu_hours = reader.number("gpu_hours", kNan),
          .usd = number_or_null(reader, "usd")};
}

EvalMetrics eval_from(const JsonReader& reader) {
  return {.step = reader.integer("step"),
          .eval_loss = reader.number("eval_loss", kNan),
          .tokens = reader.integer("eval_tokens", 0),
          .seconds = reader.number("eval_seconds", kNan),
          .gpu_hours = reader.number("gpu_hours", kNan),
          .usd = number_or_null(reader, "usd")};
}

/// A line of another shape, say of a later version, is no sample.
std::optional<ExpertMetrics> experts_from(const Json& object) {
  const Json& layers = object["expert_rows"];
  if (!layers.is_object()) return std::nullopt;
  ExpertMetrics out{object["step"].get<std::int64_t>(), {}};
  for (const auto& [name, rows] : layers.items()) {
    int layer = 0;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
    if (error != std::errc() || end != name.data() + name.size() || layer < 0 || !rows.is_array()) {
      return std::nullopt;
    }
    ExpertMetrics::Layer one{layer, {}};
    for (const Json& count : rows) {
      if (!count.is_number_unsigned()) return std::nullopt;
      one.rows.push_back(count.get<std::int64_t>());
    }
    out.layers.push_back(std::move(one));
  }
  std::sort(out.layers.begin(), out.layers.end(),
            [](const auto& a, const auto& b) { return a.layer < b.layer; });
  return out;
}

/// Calls `use(line, object)` for every line that is a whole JSON object with a step; returns the
/// number of other lines.
template <class Use>
int for_each_line(std::string_view text, const Use& use) {
  int broken = 0;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    const bool whole = end != std::string_view::npos;
    text = whole ? text.substr(end + 1) : std::string_view();
    if (line.empty() && whole) continue;
    // The newline is written with the line: without it the line may be cut inside a number.
    const Json object = whole ? Json::parse(line, nullptr, false) : Json();
    if (object.is_object() && object.contains("step") && object["step"].is_number_integer()) {
      use(line, object);
    } else {
      ++broken;
    }
  }
  return broken;
}

}  // namespace

std::string to_line(const StepMetrics& metrics) {
  Line line;
  line.add("step", metrics.step)
      .add("loss", metrics.loss)
      .add("learning_rate", metrics.learning_rate)
      .add("grad_norm", metrics.grad_norm)
      .add("tokens", metrics.tokens)
      .add("trained_tokens", metrics.trained_tokens)
      .add("seconds", metrics.seconds)
      .add("tokens_per_second", metrics.tokens_per_second)
      .add("stream_bytes", metrics.stream_bytes)
      .add("stall_seconds", metrics.stall_seconds);
  if (metrics.exchange) {
    line.add("exchange_bytes", metrics.exchange->bytes())
        .add("exchange_weight_bytes", metrics.exchange->weight_bytes)
        .add("exchange_factor_bytes", metrics.exchange->factor_bytes)
        .add("exchange_gradient_bytes", metrics.exchange->gradient_bytes)
        .add("exchange_seconds", metrics.exchange->seconds)
        .add("exchange_exposed_seconds", metrics.exchange->exposed_seconds);
  }
  if (metrics.host_bytes_peak) line.add("host_bytes_peak", *metrics.host_bytes_peak);
  return line.add("gpu_hours", metrics.gpu_hours).add("usd", metrics.usd).text();
}

std::string to_line(const EvalMetrics& metrics) {
  return Line()
      .add("step", metrics.step)
      .add("eval_loss", metrics.eval_loss)
      .add("eval_tokens", metrics.tokens)
      .add("eval_seconds", metrics.seconds)
      .add("gpu_hours", metrics.gpu_hours)
      .add("usd", metrics.usd)
      .text();
}

std::string to_line(const ExpertMetrics& metrics) {
  std::string out = "{\"step\": " + std::to_string(metrics.step) + ", \"expert_rows\": {";
  for (const ExpertMetrics::Layer& layer : metrics.layers) {
    if (&layer != &metrics.layers.front()) out += ", ";
    out += "\"" + std::to_string(layer.layer) + "\": [";
    for (std::size_t e = 0; e < layer.rows.size(); ++e) {
      out += (e == 0 ? "" : ", ") + std::to_string(layer.rows[e]);
    }
    out += "]";
  }
  return out + "}}";
}

MetricsWriter::MetricsWriter(const fs::path& path)
    : path_(path), file_(std::make_unique<FileWriter>(path, /*append=*/true)) {}

MetricsWriter MetricsWriter::create(const fs::path& path) {
  write_atomically(path, "");
  return MetricsWriter(path);
}

MetricsWriter MetricsWriter::resume(const fs::path& path, std::int64_t step) {
  if (step <= 0 || !fs::exists(path)) return create(path);
  std::string kept;
  const std::string text = read_text(path);
  for_each_line(text, [&](std::string_view line, const Json& object) {
    if (object["step"].get<std::int64_t>() > step) return;
    kept += line;
    kept += '\n';
  });
  if (kept != text) write_atomically(path, kept);
  return MetricsWriter(path);
}

void MetricsWriter::write(const StepMetrics& metrics) {
  file_->write(to_line(metrics) + "\n");
  file_->flush();
}

void MetricsWriter::write(const EvalMetrics& metrics) {
  file_->write(to_line(metrics) + "\n");
  file_->flush();
}

void MetricsWriter::sync() {
  file_->flush();
  sync_path(path_);
}

void MetricsWriter::write(const ExpertMetrics& metrics) {
  file_->write(to_line(metrics) + "\n");
  file_->flush();
}

Metrics read_metrics(const fs::path& path) {
  Metrics metrics;
  if (!fs::exists(path)) return metrics;
  const std::string where = path.string();
  metrics.broken_lines = for_each_line(read_text(path), [&](std::string_view, const Json& object) {
    const JsonReader reader(object, where);
    if (object.contains("loss")) metrics.steps.push_back(step_from(reader));
    if (object.contains("eval_loss")) metrics.evals.push_back(eval_from(reader));
    if (!object.contains("expert_rows")) return;
    if (auto sample = experts_from(object)) metrics.experts.push_back(std::move(*sample));
  });
  return metrics;
}

}  // namespace tailor
