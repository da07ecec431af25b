#include "adapters/base_record.h"

#include "base/json.h"

namespace tailor {
namespace {

bool is_plain(const std::string& format) { return format == "as_is" || format == "bf16"; }

}  // namespace

bool BaseRecord::quantised() const { return !is_plain(experts) || !is_plain(others); }

std::string BaseRecord::text() const {
  const auto word = [](const std::string& format) {
    return is_plain(format) ? std::string("as published") : "in " + format;
  };
  return "experts " + word(experts) + ", the rest " + word(others);
}

std::optional<BaseRecord> read_base_record(const fs::path& adapter) {
  const fs::path path = adapter / kBaseRecordName;
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  const Json json = read_json(path);
  const JsonReader reader(json, path.string());
  BaseRecord record;
  record.experts = reader.text("experts", record.experts);
  record.others = reader.text("others", record.others);
  return record;
}

void write_base_record(const fs::path& adapter, const BaseRecord& record) {
  write_atomically(adapter / kBaseRecordName,
                   Json{{"experts", record.experts}, {"others", record.others}}.dump(2) + "\n");
}

}  // namespace tailor
