#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <sstream>

#include "base/error.h"
#include "base/text.h"
#include "tools/recipe_inputs.h"
#include "tools/table.h"
#include "tools/terminal.h"
#include "tools/verbs.h"

namespace tailor {
namespace {

Json side_json(const SplitReport& report) {
  Json out = report.to_json();
  out["store"] = report.store.string();
  return out;
}

void print_side(const std::string& name, const SplitReport& report, std::ostream& out) {
  out << heading(name) << "  " << report.store.string() << "\n";
  TextTable table({"", ">"});
  const auto row = [&](const std::string& what, std::int64_t count, bool always) {
    if (always || count != 0) table.add({what, count_text(count)});
  };
  row("records read", report.records, true);
  row("documents kept", report.documents, true);
  row("rows", report.rows, true);
  row("tokens", report.tokens, true);
  row("trained tokens", report.trained_tokens, true);
  table.add({"rows are full to", number_text(report.fill * 100, 3) + "%"});
  row("documents truncated", report.truncated, false);
  row("tokens lost to truncation", report.truncated_tokens, false);
  row("documents split", report.split, false);
  row("left out: too long", report.dropped_too_long, false);
  row("left out: no trained token", report.dropped_untrained, false);
  row("left out by weight", report.dropped_by_weight, false);
  out << rows_text(table, "  ");
}

Json row_json(const TokenStore& store, std::int64_t row) {
  const auto begin = store.row_start()[static_cast<std::size_t>(row)];
  const auto end = store.row_start()[static_cast<std::size_t>(row) + 1];
  const auto starts = store.document_start();
  const Json files = store.manifest().value("files", Json::array());
  Json documents = Json::array();
  for (auto start = std::lower_bound(starts.begin(), starts.end(), begin); *start < end; ++start) {
    const auto document = static_cast<std::size_t>(start - starts.begin());
    const auto file = static_cast<std::size_t>(store.document_file()[document]);
    const auto from = static_cast<std::size_t>(*start);
    const auto size = static_cast<std::size_t>(*(start + 1)) - from;
    const auto ids = store.ids().subspan(from, size);
    const auto trained = store.trained().subspan(from, size);
    Json labels = Json::array();
    for (std::size_t i = 0; i < size; ++i) labels.push_back(trained[i] != 0 ? ids[i] : -100);
    documents.push_back({{"file", file < files.size() ? files[file].value("path", Json()) : Json()},
                         {"line", store.document_line()[document]},
                         {"input_ids", ids},
                         {"labels", labels}});
  }
  return {{"row", row}, {"tokens", end - begin}, {"documents", documents}};
}

}  // namespace

int run_data_prepare(const DataPrepareArguments& arguments) {
  const RecipeFile file = open_recipe(arguments.recipe, arguments.overrides);
  const PrepareReport report = prepare_recipe_data(file.recipe);
  if (arguments.json) {
    Json out = {{"train", side_json(report.train)},
                {"validation", report.validation ? side_json(*report.validation) : Json()},
                {"digest", report.digest},
                {"reused", report.reused}};
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  print_side("train", report.train, std::cout);
  if (report.validation) {
    std::cout << "\n";
    print_side("validation", *report.validation, std::cout);
  }
  if (report.reused) std::cout << "\nNothing was done: the stores were there already.\n";
  return 0;
}

int run_data_inspect(const DataInspectArguments& arguments) {
  std::optional<Tokenizer> tokenizer;
  fs::path path;
  if (arguments.recipe.ends_with(".h5")) {
    path = arguments.recipe;
  } else {
    const RecipeFile file = open_recipe(arguments.recipe, arguments.overrides);
    const PrepareReport report = prepare_recipe_data(file.recipe);
    if (arguments.validation && !report.validation) {
      throw Error(Fault::usage, {"the recipe has no validation data", file.name,
                                 "Leave --validation out, or set data.validation."});
    }
    path = arguments.validation ? report.validation->store : report.train.store;
    if (arguments.tokenizer.empty()) tokenizer = recipe_tokenizer(file.recipe);
  }
  if (!arguments.tokenizer.empty()) tokenizer = Tokenizer::load(arguments.tokenizer);
  const TokenStore store = TokenStore::open(path);
  if (!arguments.json) {
    inspect_store(store, tokenizer ? &*tokenizer : nullptr, arguments.first, arguments.rows,
                  takes_colour(STDOUT_FILENO), std::cout);
    return 0;
  }
  if (arguments.first >= store.rows()) {  // says so
    inspect_store(store, nullptr, arguments.first, 1, false, std::cerr);
  }
  Json rows = Json::array();
  const std::int64_t end = std::min(store.rows(), arguments.first + arguments.rows);
  for (std::int64_t row = arguments.first; row < end; ++row) rows.push_back(row_json(store, row));
  std::cout << Json{{"store", path.string()},
                    {"rows_total", store.rows()},
                    {"sequence_len", store.sequence_len()},
                    {"tokens", store.tokens()},
                    {"trained_tokens", store.trained_tokens()},
                    {"rows", rows}}
                   .dump()
            << "\n";
  return 0;
}

int run_data_tokenize(const DataTokenizeArguments& arguments) {
  const Tokenizer tokenizer = Tokenizer::load(arguments.tokenizer);
  if (!arguments.json) {
    tokenize_file(tokenizer, arguments.data, std::cout);
    return 0;
  }
  std::ostringstream lines;
  tokenize_file(tokenizer, arguments.data, lines);
  Json out = Json::array();
  std::istringstream in(lines.str());
  for (std::string line; std::getline(in, line);) {
    out.push_back(parse_json(line, "a tokenised line"));
  }
  std::cout << out.dump() << "\n";
  return 0;
}

}  // namespace tailor
