#include <algorithm>

#include "base/error.h"
#include "data/text/unicode.h"
#include "data/tokens/prepare.h"

namespace tailor {
namespace {

/// A text on one line, its control characters written out.
std::string on_one_line(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        // A terminal obeys escape sequences; data must not.
        out += static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? '?' : c;
    }
  }
  return out;
}

}  // namespace

void inspect_store(const TokenStore& store, const Tokenizer* tokenizer, std::int64_t first,
                   std::int64_t count, bool colour, std::ostream& out) {
  if (first < 0 || first >= store.rows()) {
    throw Error(Fault::usage, {"there is no row " + std::to_string(first) + ", the store has " +
                                   std::to_string(store.rows()),
                               store.path().string(), "Rows are counted from 0."});
  }
  const std::string on = colour ? "\xE2\x9F\xA6\033[1;32m" : "\xE2\x9F\xA6";
  const std::string off = colour ? "\033[0m\xE2\x9F\xA7" : "\xE2\x9F\xA7";
  const auto starts = store.document_start();
  const Json files = store.manifest().value("files", Json::array());
  for (std::int64_t row = first;
       row < std::min(store.rows(), first + std::max<std::int64_t>(0, count)); ++row) {
    const std::int64_t begin = store.row_start()[static_cast<std::size_t>(row)];
    const std::int64_t end = store.row_start()[static_cast<std::size_t>(row) + 1];
    out << "row " << row << ": " << (end - begin) << " of " << store.sequence_len() << " tokens\n";
    auto start = std::lower_bound(starts.begin(), starts.end(), begin);
    for (; *start < end; ++start) {
      const auto document = static_cast<std::size_t>(start - starts.begin());
      const auto file = static_cast<std::size_t>(store.document_file()[document]);
      const std::string name = file < files.size() && files[file].contains("path")
                                   ? files[file]["path"].get<std::string>()
                                   : "file " + std::to_string(file);
      out << "  " << name << ":" << store.document_line()[document] << "  ";
      const auto last = static_cast<std::size_t>(*(start + 1));
      std::vector<std::int32_t> run;
      bool trained = false;
      const auto flush = [&] {
        if (run.empty()) return;
        std::string text;
        if (tokenizer != nullptr) {
          text = on_one_line(tokenizer->decode(run, false));
        } else {
          for (const std::int32_t id : run) text += (text.empty() ? "" : " ") + std::to_string(id);
        }
        out << (trained ? on + text + off : text) << (tokenizer == nullptr ? " " : "");
        run.clear();
      };
      for (auto t = static_cast<std::size_t>(*start); t < last; ++t) {
        const bool now = store.trained()[t] != 0;
        if (now != trained) flush();
        trained = now;
        run.push_back(store.ids()[t]);
      }
      flush();
      out << "\n";
    }
  }
}

std::int64_t tokenize_file(const Tokenizer& tokenizer, const fs::path& path, std::ostream& out) {
  RecordReader reader(path, RecordFormat::text, 0);
  std::int64_t lines = 0;
  while (const std::optional<Record> record = reader.next()) {
    const auto ids = tokenizer.encode(std::get<PlainText>(record->content).text);
    out << Json{{"input_ids", ids}}.dump() << "\n";
    ++lines;
  }
  if (!out)
    throw Error(Fault::io,
                {"cannot write the tokenised lines", "standard output", "Check the disk or pipe."});
  return lines;
}

}  // namespace tailor
