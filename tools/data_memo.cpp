#include "tools/data_memo.h"

#include "base/file.h"
#include "base/json.h"
#include "data/checkpoint/checkpoint.h"
#include "data/text/records.h"
#include "tools/paths.h"

namespace tailor {
namespace {

std::string sources_text(const std::vector<DataSource>& sources) {
  std::string out;
  for (const DataSource& source : sources) {
    out += std::to_string(source.weight) + " " +
           std::to_string(source.format ? static_cast<int>(*source.format) : -1) + "\n";
    for (const fs::path& file : expand_files(source.path)) out += file_stamp(file);
  }
  return out + "-\n";
}

/// Throws Error where data files or the model are not here.
fs::path memo_path(const Recipe& recipe) {
  const DataRecipe& data = recipe.data;
  std::string key = "1\n" + sources_text(data.train) + sources_text(data.validation);
  key += std::to_string(data.validation_split.value_or(0)) + " " +
         std::to_string(static_cast<int>(data.format)) + " " +
         std::to_string(static_cast<int>(data.chat_template.kind)) + " " +
         data.chat_template.value + " " + data.train_on.text() + " " +
         std::to_string(data.sequence_len) + " " + std::to_string(data.packing ? 1 : 0) + " " +
         std::to_string(static_cast<int>(data.too_long)) + " " + data.store.value_or("") + "\n";
  key += file_stamp(data.chat_template.value);
  const fs::path model = find_model_folder(recipe.base_model);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                           "chat_template.json", "special_tokens_map.json"}) {
    key += file_stamp(model / name);
  }
  return cache_folder() / "tokens" / (sha256_hex(key).substr(0, 32) + ".stats.json");
}

}  // namespace

DataStats stats_of(const PrepareReport& report) {
  std::error_code error;
  const auto bytes = fs::file_size(report.train.store, error);
  return {report.train.rows,
          report.train.trained_tokens,
          error ? 0 : static_cast<std::int64_t>(bytes),
          report.validation ? report.validation->rows : 0,
          report.train.tokens,
          report.validation ? report.validation->tokens : 0,
          report.train.documents};
}

void remember_data(const Recipe& recipe, const PrepareReport& report) {
  try {
    const fs::path path = memo_path(recipe);
    std::error_code error;
    if (report.reused && fs::exists(path, error)) return;
    const DataStats stats = stats_of(report);
    const Json memo = {{"store", fs::absolute(report.train.store).string()},
                       {"store_bytes", stats.store_bytes},
                       {"rows", stats.rows},
                       {"tokens", stats.tokens},
                       {"trained_tokens", stats.trained_tokens},
                       {"documents", stats.documents},
                       {"validation_rows", stats.validation_rows},
                       {"validation_tokens", stats.validation_tokens}};
    make_folders(path.parent_path());
    write_atomically(path, memo.dump(2) + "\n");
  } catch (const Error&) {  // tokenised rows without a model, a full disk
  }
}

std::optional<DataStats> recall_data(const Recipe& recipe) {
  try {
    const fs::path path = memo_path(recipe);
    std::error_code error;
    if (!fs::exists(path, error)) return std::nullopt;
    const Json json = read_json(path);
    const JsonReader memo(json, path.string());
    DataStats out;
    out.store_bytes = memo.integer("store_bytes");
    const auto bytes = fs::file_size(memo.text("store"), error);
    if (error || static_cast<std::int64_t>(bytes) != out.store_bytes) return std::nullopt;
    out.rows = memo.integer("rows");
    out.tokens = memo.integer("tokens");
    out.trained_tokens = memo.integer("trained_tokens");
    out.documents = memo.integer("documents");
    out.validation_rows = memo.integer("validation_rows");
    out.validation_tokens = memo.integer("validation_tokens");
    if (out.rows <= 0 || out.tokens <= 0) return std::nullopt;
    return out;
  } catch (const Error&) {
    return std::nullopt;
  }
}

}  // namespace tailor
